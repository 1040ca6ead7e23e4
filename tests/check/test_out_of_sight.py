"""A part of the tree that cannot be read at the moment: nothing that may belong to it is taken for dead."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cryptfs.names import DIR_LOG
from cryptfs.ops.check_report import Finding, What
from cryptfs.store.local import LocalStore
from tests.check.lab import OWN, Lab, flip


class Refusing(LocalStore):
    """Opening or reading what has one of these inode numbers fails."""

    refused: dict[int, int]

    def open(self, dir_fd: int, name: bytes, flags: int, mode: int = 0o600) -> int:
        if not flags & os.O_CREAT:
            self._refuse(dir_fd, name)
        return super().open(dir_fd, name, flags, mode)

    def readlink(self, dir_fd: int, name: bytes) -> bytes:
        self._refuse(dir_fd, name)
        return super().readlink(dir_fd, name)

    def _refuse(self, dir_fd: int, name: bytes) -> None:
        try:
            code = self.refused.get(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_ino)
        except FileNotFoundError:
            return
        if code is not None:
            raise OSError(code, os.strerror(code))


@contextmanager
def refused(lab: Lab, monkeypatch: pytest.MonkeyPatch, code: int, *paths: Path) -> Iterator[None]:
    """`paths` cannot be read meanwhile."""
    numbers = {path.lstat().st_ino: code for path in paths}

    def store() -> LocalStore:
        made = Refusing(lab.root)
        made.refused = numbers
        return made

    with monkeypatch.context() as patch:
        patch.setattr(lab, "store", store)
        yield


async def with_attributes(lab: Lab) -> dict[bytes, tuple[Path, bytes]]:
    """A fifo in `docs` that has some: only `docs`' log knows its id."""
    store = lab.store()
    volume = await lab.sample.open(store)
    try:
        docs = (await volume.names.lookup(volume.root, b"docs")).inode
        docs.lookups += 1
        attr = await volume.names.mknod(docs, b"queue", 0o010600, 0, OWN)
        await volume.xattrs.set(attr.inode, b"trusted.what", b"a fifo's", lambda _gid: True)
        assert await volume.close()
    finally:
        store.close_store()
    return await lab.places()


def kept(lab: Lab) -> dict[str, bytes]:
    """What lies in `sidecars/` and in the tree."""
    return {
        str(path.relative_to(lab.root)): path.read_bytes()
        for top in ("sidecars", "tree")
        for path in (lab.root / top).rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def unreadable(findings: list[Finding]) -> set[bytes]:
    return {finding.path for finding in findings if finding.what is What.UNREADABLE}


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("what", ["log", "directory"])
async def test_a_directory_that_cannot_be_read(what: str, code: int, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    places = await with_attributes(lab)
    docs = places[b"/docs"][0]
    before = kept(lab)
    orphan = lab.sidecar(bytes(range(16)))
    orphan.write_bytes(b"x")
    with refused(lab, monkeypatch, code, docs / os.fsdecode(DIR_LOG) if what == "log" else docs):
        report = await lab.check()
        assert report.result == "damaged"
        assert unreadable(report.findings) == {b"/docs"}
        repaired = await lab.repair()
    assert unreadable(repaired.findings) == {b"/docs"}
    assert not any(finding.action for finding in repaired.findings)
    # Nobody knows whose it is: perhaps something's that could not be seen.
    assert orphan.exists()
    orphan.unlink()
    assert kept(lab) == before
    assert (await lab.check(deep=True)).findings == []
    assert {p: c for p, c in (await lab.read()).items() if p in lab.content} == lab.content


async def test_a_directory_whose_log_was_moved_away_and_brought_back(lab: Lab) -> None:
    places = await with_attributes(lab)
    log = places[b"/docs"][0] / os.fsdecode(DIR_LOG)
    before = kept(lab)
    log.rename(log.with_name(".a"))
    os.mkfifo(log)
    repaired = await lab.repair()
    assert unreadable(repaired.findings) == {b"/docs"}
    log.unlink()
    log.with_name(".a").rename(log)
    assert kept(lab) == before
    assert (await lab.repair()).findings == []
    assert {p: c for p, c in (await lab.read()).items() if p in lab.content} == lab.content


async def test_what_was_taken_for_an_orphan_comes_back_with_its_directory(lab: Lab, tmp_path: Path) -> None:
    places = await with_attributes(lab)
    before = kept(lab)
    away = tmp_path / "away"
    places[b"/docs"][0].rename(away)
    assert (await lab.repair()).result == "repaired"
    assert not lab.sidecar(places[b"/docs/a"][1]).exists()
    # As a user does it: the directory, and a `.dir` above it that still has it, from a backup.
    away.rename(places[b"/docs"][0])
    (lab.tree / os.fsdecode(DIR_LOG)).write_bytes(before["tree/.dir"])
    back = await lab.repair()
    assert back.result == "repaired"
    assert {f.action for f in back.findings} == {"its sidecar lay in damaged/ and was put back"}
    assert kept(lab) == before
    assert (await lab.repair(deep=True)).findings == []
    assert {p: c for p, c in (await lab.read()).items() if p in lab.content} == lab.content


async def test_only_what_is_authentic_comes_back(lab: Lab) -> None:
    places = await lab.places()
    a, b = (places[path][1] for path in (b"/docs/a", b"/docs/b"))
    damaged = lab.root / "damaged"
    damaged.mkdir()
    lab.sidecar(a).rename(damaged / f"{a.hex()}.sidecar")
    (damaged / f"{b.hex()}.sidecar").write_bytes((damaged / f"{a.hex()}.sidecar").read_bytes())
    lab.sidecar(b).unlink()
    flip(damaged / f"{a.hex()}.sidecar", 20)
    repaired = await lab.repair()
    assert not [f for f in repaired.findings if "put back" in f.action]
    assert not lab.sidecar(b).exists()


@pytest.mark.parametrize("path", [b"/small", b"/link"])
async def test_a_thing_that_cannot_be_read_stays_in_its_place(
    path: bytes, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = (await lab.places())[path]
    before = kept(lab)
    with refused(lab, monkeypatch, errno.EIO, place):
        repaired = await lab.repair()
    assert unreadable(repaired.findings) == {path}
    assert kept(lab) == before
    assert await lab.read() == lab.content


async def test_a_stray_that_cannot_be_read_stays_and_its_entry_too(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the very file that an entry misses, and nobody can see that."""
    place, file_id = (await lab.places())[b"/small"]
    moved = lab.tree / "moved"
    place.rename(moved)
    with refused(lab, monkeypatch, errno.EIO, moved):
        assert (await lab.repair()).result == "damaged"
    assert moved.exists()
    assert lab.sidecar(file_id).exists()
    assert (await lab.repair()).result == "repaired"
    assert await lab.read() == lab.content


async def test_attributes_that_cannot_be_read_are_not_given_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    places = await with_attributes(lab)
    sidecar = lab.sidecar(places[b"/docs/queue"][1])
    before = kept(lab)
    with refused(lab, monkeypatch, errno.EIO, sidecar):
        repaired = await lab.repair()
    assert unreadable(repaired.findings) == {b"/docs/queue"}
    assert kept(lab) == before


async def test_a_log_that_cannot_be_read_twice_keeps_its_names(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged when it was looked at, refused when it is to be replaced: its names key is in it."""
    places = await lab.places()
    log = places[b"/docs"][0] / os.fsdecode(DIR_LOG)
    flip(log, 160 + 152 + 60)
    with monkeypatch.context() as patch:
        from cryptfs.ops import check_logs

        def refuse(*_args: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(check_logs, "open_ours", refuse)
        report = await lab.repair()
    assert [f.path for f in report.findings if not f.action] == [b"/docs"]
    assert log.read_bytes()
    assert (await lab.repair()).result == "repaired"
    names = {os.path.basename(path) for path in await lab.read()}
    assert {b"a", b"b", b"deep", b"c"} <= names
