#!/usr/bin/env python3
"""Make the golden volumes of format version 1, v1.tar.gz and v1-keys.tar.gz. What is in them: v1.json, v1-keys.json.

    PYTHONPATH=. .venv/bin/python tests/volumes/make_v1.py

v1-keys is about keys: three protectors, a shred secret, two rotations (the KEK of one destroyed, of the other not yet),
a domain with keys of its own, a policy. Its secrets but for the passphrase are in the archive, beside it.

Needs /dev/fuse and root (for `trusted.` attributes). The volumes are made by the commands a person uses; its passphrase
is that of `tests.mount.box`. It is an archive because a version control system keeps no hard links, holes, fifos,
times or empty directories. To be run again only when the format changes, with the change named in FORMAT.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from pathlib import Path

from tests.mount.box import Box, boxed
from tests.reference.trees import describe

HERE = Path(__file__).resolve().parent
BLOCK = 4096
THEN_S = 1_600_000_000


def write_at(path: Path, data: bytes, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def fill(top: Path) -> None:
    """Every shape of file and name that the format treats in a way of its own."""
    noise = random.Random(0).randbytes
    (top / "sub" / "deeper").mkdir(parents=True)
    (top / "empty-dir").mkdir(mode=0o750)
    (top / "hello.txt").write_text("hello, world\n")
    (top / "empty").touch()
    (top / "one-block").write_bytes(noise(BLOCK))
    (top / "several").write_bytes(noise(3 * BLOCK + 7))

    holes = top / "holes"
    holes.touch()
    write_at(holes, b"middle", 5 * BLOCK - 3)
    os.truncate(holes, 9 * BLOCK + 1)

    overwritten = top / "overwritten"
    overwritten.write_bytes(noise(4 * BLOCK))
    for offset in (0, BLOCK, BLOCK + 100, 3 * BLOCK - 10):
        write_at(overwritten, noise(300), offset)

    cut = top / "cut-and-grown"
    cut.write_bytes(noise(3 * BLOCK))
    os.truncate(cut, BLOCK + 10)
    os.truncate(cut, 2 * BLOCK + 20)
    write_at(cut, b"tail", 2 * BLOCK + 18)

    (top / ("long name " * 25)).write_text("a name of 250 bytes")
    Path(os.fsdecode(os.fsencode(top) + b"/bytes \xff\n\x01 .")).write_bytes(b"\xff")
    (top / ".dir").write_text("a name that means something in the cipher directory")
    os.symlink("sub/../hello.txt", top / "symlink")
    os.symlink("t" * 1000, top / "sub" / "long-symlink")
    os.link(top / "hello.txt", top / "sub" / "deeper" / "hard-link")
    os.mkfifo(top / "fifo", 0o640)

    (top / "moved").write_text("renamed into another directory")
    os.rename(top / "moved", top / "sub" / "deeper" / "moved")
    (top / "old").write_text("renamed over")
    (top / "victim").write_text("gone")
    os.rename(top / "old", top / "victim")
    (top / "removed").write_text("gone")
    os.unlink(top / "removed")
    os.chmod(top / "one-block", 0o444)

    for path in (top / "several", top / "empty", top / "sub"):
        os.setxattr(path, "user.note", os.fsencode(path.name))
    os.setxattr(top / "several", "user.gone", b"gone")
    os.removexattr(top / "several", "user.gone")
    os.setxattr(top / "several", "user.empty", b"")
    for name in ("symlink", "fifo", "sub/deeper", "holes"):
        os.setxattr(top / name, "trusted.mark", name.encode(), follow_symlinks=False)

    for n, path in enumerate(sorted(top.rglob("*"), reverse=True)):
        os.utime(path, ns=(THEN_S * 10**9, THEN_S * 10**9 + n), follow_symlinks=False)


def pack(box: Box, name: str, *members: str) -> None:
    tar = ["tar", "-cSf", "-", "--format=posix", "--pax-option=delete=atime,delete=ctime", "--sort=name"]
    tar += ["--owner=0", "--group=0", "--numeric-owner", "-C", str(box.root), *members]
    packed = subprocess.run(tar, check=True, stdout=subprocess.PIPE)
    with (HERE / f"{name}.tar.gz").open("wb") as out:
        subprocess.run(["gzip", "-9n"], input=packed.stdout, stdout=out, check=True)


def say(name: str, expected: object) -> None:
    (HERE / f"{name}.json").write_text(json.dumps(expected, indent=1) + "\n")


def make_plain(box: Box) -> None:
    box.init("--block-size", str(BLOCK), "--label", "golden")
    box.mount()
    fill(box.clear)
    box.remount()
    expected = describe(box.clear)
    box.umount()
    pack(box, "v1", "vault")
    say("v1", expected)


def make_keys(box: Box) -> None:
    key, recovery, shred = box.root / "key", box.root / "recovery.txt", box.root / "shred.key"
    domain_key, domain_shred = box.root / "domain.key", box.root / "domain-shred.key"
    box.init("--block-size", str(BLOCK), "--label", "golden", "--shred-keyfile", str(shred))
    box.run("protector", "add", box.vault, "--kind", "keyfile", "--new-keyfile", key)
    box.run("protector", "add", box.vault, "--kind", "recovery", "--out", recovery)
    box.mount()
    box.run("policy", box.vault, "--max-age", "30")
    written = box.clear / "written"
    written.mkdir()
    rotate = ("rotate", box.vault, "--kek", "--keep", f"keyfile={key}", "--keep", f"recovery={recovery}")
    for when in ("first", "second", "third"):
        (written / when).write_text(f"under the {when} KEK\n" * 1000)
        os.setxattr(written / when, "user.kek", when.encode())
        os.symlink(when, written / f"{when} link")
        if when == "first":
            box.run(*rotate, "--protector", "golden", "--destroy-old")
        elif when == "second":
            box.run(*rotate, "--protector", "golden")
    payroll = box.clear / "payroll"
    box.run_without_passphrase(
        "domain", "create", payroll, "--new-keyfile", domain_key, "--shred-keyfile", domain_shred
    )  # fmt: skip
    (payroll / "january").write_text("what everybody gets\n" * 500)
    (payroll / "years").mkdir()
    (payroll / "years" / "2025").write_bytes(b"all of it")
    expected = {"volume": describe(box.clear), "domain": describe(payroll)}
    box.umount()
    [domain] = os.listdir(box.vault / "domains")
    secrets = (path.name for path in (key, recovery, shred, domain_key, domain_shred))
    pack(box, "v1-keys", "vault", *secrets)
    say("v1-keys", {"domain_id": domain, **expected})


def main() -> None:
    for make in (make_plain, make_keys):
        with tempfile.TemporaryDirectory() as parent, boxed(Path(parent)) as box:
            make(box)


if __name__ == "__main__":
    main()
