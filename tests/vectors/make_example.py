#!/usr/bin/env python3
"""Make the worked example of FORMAT.md (§11): a tiny volume with fixed keys, from the document alone.

    make_example.py DEST         write the volume to the new directory DEST (passphrase: see PASSPHRASE)
    make_example.py --markdown   print §11

Nothing here comes from cryptfs: the test beside it compares this with what the program parses and produces.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import msgpack
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

PASSPHRASE = b"correct horse battery staple"
NAME = b"hello.txt"
CONTENT = b"hello, world\n"
BLOCK_SIZE = 4096
CREATED_S = 1_700_000_000
EPOCH = 1
KDF_PARAMS = {"memory_kib": 8192, "iterations": 1, "lanes": 1}


def fixed(label: str, size: int) -> bytes:
    """A fixed key or id: the start of SHA-512("cryptfs example: " || label)."""
    return hashlib.sha512(b"cryptfs example: " + label.encode()).digest()[:size]


KEK = fixed("KEK", 32)
VOLUME_ID = fixed("volume id", 16)
ROOT_ID = fixed("root directory id", 16)
FILE_ID = fixed("file id", 16)
VOLUME_KEY = fixed("volume key", 32)
STATE_KEY = fixed("state key", 32)
NAMES_KEY = fixed("names key", 64)
DEK = fixed("DEK", 32)


def wrapping_key(purpose: bytes, log_id: bytes) -> bytes:
    info = b"cryptfs/1/" + purpose + b"\0" + VOLUME_ID + log_id + struct.pack(">I", 1)
    return HKDFExpand(SHA256(), 32, info).derive(KEK)


def wrap(purpose: bytes, log_id: bytes, key: bytes) -> bytes:
    return bytes(aes_key_wrap(wrapping_key(purpose, log_id), key))


def generation(counter: int) -> int:
    return EPOCH << 40 | counter


def log_header(kind: int, log_id: bytes, log_key: bytes, names_key: bytes) -> bytes:
    wrapped = wrap(b"log-dir" if kind == 2 else b"log-file", log_id, log_key)
    names = wrap(b"names", log_id, names_key) if names_key else bytes(72)
    return struct.pack(">8sB3xI16s40s72s16x", b"CFSLOG1\0", kind, 1, log_id, wrapped, names)


def snapshot(
    log_id: bytes, log_key: bytes, previous: bytes, counter: int, size: int, blocks: int, payload: dict[str, object]
) -> bytes:
    body = bytes(msgpack.packb(payload))
    head = struct.pack(">4sB3xQQQQQI4x", b"CFF1", 2, generation(counter), 0, size, 0, blocks, len(body))
    head += hashlib.sha256(body).digest() + previous
    mac = hmac.digest(log_key, log_id + head, "sha256")
    return head + mac + body + struct.pack(">I4s", 160 + len(body), b"CFE1")


def log(kind: int, log_id: bytes, names_key: bytes, counter: int, size: int, blocks: int, **payload: object) -> bytes:
    log_key = fixed(f"log key {log_id.hex()}", 32)
    header = log_header(kind, log_id, log_key, names_key)
    return header + snapshot(log_id, log_key, hashlib.sha256(header).digest(), counter, size, blocks, payload)


def volume_file() -> bytes:
    salt, protector_id, nonce = fixed("salt", 16), fixed("protector id", 16), fixed("nonce", 12)
    root_key = Argon2id(salt=salt, length=32, iterations=1, lanes=1, memory_cost=8192).derive(PASSPHRASE)
    aad = b"cryptfs/1/protector\0" + VOLUME_ID + protector_id + struct.pack(">I", 1)
    protector = {
        "id": protector_id,
        "kind": "passphrase",
        "label": "example",
        "created_s": CREATED_S,
        "params": {"kdf": "argon2id", "salt": salt, **KDF_PARAMS},
        "keks": [[1, nonce + AESGCM(root_key).encrypt(nonce, KEK, aad)]],
    }
    body: bytes = msgpack.packb(
        {
            "volume_id": VOLUME_ID,
            "serial": 1,
            "created_s": CREATED_S,
            "block_size": BLOCK_SIZE,
            "features": [],
            "root_dir_id": ROOT_ID,
            "kek_version": 1,
            "volume_key": [1, wrap(b"volume", bytes(16), VOLUME_KEY)],
            "policy": {},
            "shred": None,
            "protectors": [protector],
        }
    )
    raw = b"CRYPTFS\0" + struct.pack(">HHI", 1, 0, len(body)) + body
    return raw + hmac.digest(wrapping_key(b"volume-mac", bytes(16)), raw, "sha256")


def state_slot(sequence: int, epoch: int, clean: int) -> bytes:
    wrapped = wrap(b"state", bytes(16), STATE_KEY)
    slot = struct.pack(">8sQIB403xI40s12x", b"CFSTATE1", sequence, epoch, clean, 1, wrapped)
    return slot + hmac.digest(STATE_KEY, VOLUME_ID + slot, "sha256")


@dataclass(frozen=True)
class Example:
    """All files of the example volume."""

    volume: bytes
    state: bytes
    dir_log: bytes
    tree_name: bytes
    data_file: bytes
    sidecar: bytes

    def write(self, dest: Path) -> None:
        """Make the cipher directory `dest`."""
        hidden = FILE_ID.hex()
        for name in ("tree", "tmp"):
            (dest / name).mkdir(parents=True)
        for byte in range(256):
            (dest / "sidecars" / f"{byte:02x}").mkdir(parents=True)
        (dest / "volume").write_bytes(self.volume)
        (dest / "state").write_bytes(self.state)
        (dest / "tree" / ".dir").write_bytes(self.dir_log)
        (dest / "tree" / self.tree_name.decode()).write_bytes(self.data_file)
        (dest / "sidecars" / hidden[:2] / hidden).write_bytes(self.sidecar)


def make() -> Example:
    """The volume after one epoch in which `hello.txt` was made, written and closed, and a clean unmount."""
    sealed_name = AESSIV(NAMES_KEY).encrypt(NAME, [ROOT_ID])
    dir_log = log(2, ROOT_ID, NAMES_KEY, 1, 1, 0, e=[[sealed_name, 1, FILE_ID, 0]])
    header = struct.pack(">8s16sQ", b"CFDATA1\0", FILE_ID, generation(2))
    header += hmac.digest(VOLUME_KEY, VOLUME_ID + header, "sha256")
    version = generation(3)
    aad = b"CFBLOCK1" + VOLUME_ID + FILE_ID + struct.pack(">QQI", 0, version, len(CONTENT))
    sealed = AESGCM(DEK).encrypt(bytes(12), CONTENT, aad)
    run = [0, version, len(CONTENT), 0, 1, wrap(b"block", FILE_ID, DEK), sealed[-16:]]
    return Example(
        volume_file(),
        state_slot(2, EPOCH, 1) + state_slot(1, EPOCH, 0),
        dir_log,
        base64.urlsafe_b64encode(sealed_name).rstrip(b"="),
        header + sealed[:-16],
        log(1, FILE_ID, b"", 4, len(CONTENT), 1, r=[run]),
    )


def dump(raw: bytes, rows: list[tuple[int, str]], *, short: bool = False) -> str:
    """A hex dump, one table row per field: (size, meaning); long fields wrap at 32 bytes, or end there if `short`."""
    lines, at = [], 0
    for size, meaning in rows:
        field = raw[at : at + size]
        assert len(field) == size, meaning
        zeros = short and size > 32 and not any(field)
        for start in range(0, 32 if zeros else size, 32):
            text = field[start : start + 32].hex()
            said = f"… {size} zero bytes" if zeros else meaning if not start else ""
            lines.append(f"{at + start:5d}  {text:64s}  {said}".rstrip())
        at += size
    assert at == len(raw), (at, len(raw))
    return "\n".join(lines)


def dump_log(raw: bytes, names: str, size: str) -> str:
    """A log of one frame."""
    (length,) = struct.unpack_from(">I", raw, 160 + 48)
    header = [(8, "magic"), (1, "kind"), (3, "zero"), (4, "KEK version"), (16, "log id"), (40, "wrapped log key")]
    head = [(4, "magic"), (1, "snapshot"), (3, "zero"), (8, "generation"), (8, "durable_up_to"), (8, size)]
    head += [(8, "first block"), (8, "one past the last block"), (4, "payload length"), (4, "zero")]
    head += [(32, "SHA-256 of the payload"), (32, "SHA-256 of the log's header"), (32, "MAC")]
    foot = [(length, "payload"), (4, "length of the frame"), (4, "end magic")]
    return dump(raw, [*header, (72, names), (16, "zero"), *head, *foot])


def markdown() -> str:
    """§11 of FORMAT.md."""
    example = make()
    keys = "\n".join(
        f"{label:18s} {key.hex()}"
        for label, key in (
            ("volume id", VOLUME_ID),
            ("root directory id", ROOT_ID),
            ("file id", FILE_ID),
            ("KEK, version 1", KEK),
            ("volume key", VOLUME_KEY),
            ("state key", STATE_KEY),
            ("names key", NAMES_KEY[:32]),
            ("", NAMES_KEY[32:]),
            ("DEK", DEK),
        )
    )
    wraps = "\n".join(
        f"{purpose.decode():18s} {wrapping_key(purpose, log_id).hex()}"
        for purpose, log_id in (
            (b"block", FILE_ID),
            (b"log-file", FILE_ID),
            (b"log-dir", ROOT_ID),
            (b"names", ROOT_ID),
            (b"state", bytes(16)),
        )
    )
    data = [(8, "magic"), (16, "file id"), (8, "generation of its creation"), (32, "MAC"), (13, "block 0")]
    slot = [(8, "magic"), (8, "sequence number"), (4, "mount epoch"), (1, "clean"), (1, "ranges"), (2, "zero")]
    slot += [(400, "zero"), (4, "KEK version"), (40, "wrapped state key"), (12, "zero"), (32, "MAC")]
    state = dump(example.state[:512], slot, short=True)
    return f"""## 11. A worked example

A volume with blocks of {BLOCK_SIZE} bytes whose root directory holds one file, `{NAME.decode()}` with the text
`{CONTENT.decode().strip()}` and a newline, after a clean unmount of epoch {EPOCH}. Its keys and ids are fixed (the
start of SHA-512 of `cryptfs example: ` and their name), so that every byte can be computed again:
`tests/vectors/make_example.py` does, and the tests hold the program against it. Hexadecimal; offsets are decimal.

```
{keys}
```

Wrapping keys (§1), for KEK version 1:

```
{wraps}
```

`state`, first slot:

```
{state}
```

`tree/.dir`. The payload is `{{"e": [[sealed name, 1, file id, 0]]}}`:

```
{dump_log(example.dir_log, "wrapped names key", "number of entries")}
```

`tree/{example.tree_name.decode()}`, the data file:

```
{dump(example.data_file, data)}
```

`sidecars/{FILE_ID.hex()[:2]}/{FILE_ID.hex()}`. The payload is
`{{"r": [[0, {generation(3)}, {len(CONTENT)}, 0, 1, wrapped DEK, tag]]}}`:

```
{dump_log(example.sidecar, "zero", "plaintext size")}
```
"""


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        sys.stdout.write(markdown())
    elif len(sys.argv) == 2:
        make().write(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
