"""FORMAT.md's worked example is true: the program parses it, and makes the same bytes from the same keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cryptfs.crypto.aead import block_aad, open_into
from cryptfs.crypto.mac import mac, sha256
from cryptfs.crypto.siv import NameCipher
from cryptfs.crypto.wrap import ZERO_ID, unwrap_keys, volume_mac_matches, wrapping_key
from cryptfs.format import log
from cryptfs.format.datafile import HEADER_BYTES as DATA_HEADER_BYTES
from cryptfs.format.datafile import decode_data_header
from cryptfs.format.dirlog import DirPayload, Entry, decode_dir
from cryptfs.format.sidecar import SidecarPayload, decode_sidecar
from cryptfs.format.state import SLOT_BYTES, State, decode_slot
from cryptfs.format.volume import encode_volume, parse_volume, split_mac
from cryptfs.names import tree_name
from cryptfs.types import Kind, Purpose
from tests.vectors import make_example as example

ROOT = Path(__file__).resolve().parents[2]
MADE = example.make()


def unwrap(purpose: Purpose, log_id: bytes, wrapped: bytes) -> bytes:
    key = unwrap_keys(wrapping_key(example.KEK, purpose, example.VOLUME_ID, log_id, 1), wrapped, len(wrapped))
    assert key is not None
    return key


def check_log(raw: bytes, purpose: Purpose) -> tuple[log.LogHeader, log.Head, bytes]:
    """The only frame of a log, parsed, verified and made again."""
    header = log.decode_header(raw[: log.HEADER_BYTES])
    head_end = log.HEADER_BYTES + log.HEAD_BYTES
    head = log.decode_head(raw[log.HEADER_BYTES : head_end])
    payload = raw[head_end : head_end + head.payload_len]
    assert head.kind == log.SNAPSHOT
    assert head.prev_mac == sha256(header.encode())
    assert head.payload_sha256 == sha256(payload)
    log_key = unwrap(purpose, header.log_id, header.log_wrapped)
    assert head.mac == mac(log_key, header.log_id, head.signed())
    assert raw == header.encode() + head.signed() + head.mac + payload + log.encode_foot(head.frame_bytes)
    return header, head, payload


def test_the_document_has_the_example_the_script_makes() -> None:
    document = (ROOT / "docs/FORMAT.md").read_text()
    section = document[document.index("## 11. ") :].split("\n## ")[0].rstrip("\n") + "\n"
    assert section == example.markdown()


def test_the_volume_file() -> None:
    volume = parse_volume(MADE.volume)
    assert (volume.volume_id, volume.root_dir_id) == (example.VOLUME_ID, example.ROOT_ID)
    assert unwrap(Purpose.VOLUME, ZERO_ID, volume.volume_key.wrapped) == example.VOLUME_KEY
    signed, tag = split_mac(MADE.volume)
    assert encode_volume(volume) == signed
    assert volume_mac_matches(example.KEK, example.VOLUME_ID, 1, signed, tag)


def test_the_state_file() -> None:
    states = []
    for at in (0, SLOT_BYTES):
        decoded = decode_slot(MADE.state[at : at + SLOT_BYTES])
        assert decoded is not None
        assert unwrap(Purpose.STATE, ZERO_ID, decoded.wrapped) == example.STATE_KEY
        assert decoded.mac == mac(example.STATE_KEY, example.VOLUME_ID, decoded.signed())
        assert decoded.state.slot * SLOT_BYTES == at
        states.append(decoded.state)
    mounted = State(0, 0, True).next_epoch()
    assert states == [mounted.ended(), mounted]


def test_the_directory_log() -> None:
    header, head, payload = check_log(MADE.dir_log, Purpose.LOG_DIR)
    assert header.kind == log.KIND_DIR
    assert head.size == 1
    decoded = decode_dir(payload)
    names = NameCipher(unwrap(Purpose.NAMES, header.log_id, header.names_wrapped), header.log_id)
    sealed = names.seal(example.NAME)
    assert decoded == DirPayload((Entry(sealed, Kind.FILE, example.FILE_ID),))
    assert decoded.encode() == payload
    assert tree_name(sealed) == MADE.tree_name


def test_the_data_file_and_its_sidecar() -> None:
    data_header = decode_data_header(MADE.data_file[:DATA_HEADER_BYTES])
    assert data_header.file_id == example.FILE_ID
    assert data_header.mac == mac(example.VOLUME_KEY, example.VOLUME_ID, data_header.signed())
    _, head, payload = check_log(MADE.sidecar, Purpose.LOG_FILE)
    decoded = decode_sidecar(payload, example.BLOCK_SIZE)
    assert decoded.encode() == payload
    assert decoded.extent() == (head.first, head.end) == (0, 1)
    [run] = decoded.runs
    assert decoded == SidecarPayload((run,))
    assert head.size == run.last_len == len(example.CONTENT)
    dek = unwrap(Purpose.BLOCK, example.FILE_ID, run.wrapped)
    aad = block_aad(example.VOLUME_ID, example.FILE_ID, 0, run.version, run.last_len)
    out = bytearray(run.last_len)
    sealed = bytearray(MADE.data_file[DATA_HEADER_BYTES:] + run.tags)
    assert open_into(dek, aad, memoryview(sealed), memoryview(out))
    assert out == example.CONTENT


def test_the_reference_decryptor_reads_it(tmp_path: Path) -> None:
    MADE.write(tmp_path / "cipher")
    (tmp_path / "pass").write_bytes(example.PASSPHRASE + b"\n")
    command = [sys.executable, str(ROOT / "scripts/reference_decrypt.py"), str(tmp_path / "cipher")]
    command += [str(tmp_path / "plain"), "--passfile", str(tmp_path / "pass")]
    subprocess.run(command, check=True)
    assert [path.name for path in (tmp_path / "plain").iterdir()] == [example.NAME.decode()]
    assert (tmp_path / "plain" / example.NAME.decode()).read_bytes() == example.CONTENT
