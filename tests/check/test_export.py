"""Copying out of a volume without FUSE: everything is kept, nothing overwritten, damage stops it or is passed over."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cryptfs.errors import Damaged, UsageError
from cryptfs.ops.export import Exported, check_dest, export_tree
from tests.check.lab import BLOCK, OWN, Lab, flip


async def export(lab: Lab, path: str, dest: Path, *, skip: bool = False) -> Exported:
    return await export_tree(lab.access, os.fsencode(path), os.fsencode(dest), skip_damaged=skip)


def content_of(top: Path) -> dict[bytes, bytes | str | None]:
    out: dict[bytes, bytes | str | None] = {}
    for path in top.rglob("*"):
        name = b"/" + os.fsencode(path.relative_to(top))
        if path.is_symlink():
            out[name] = os.readlink(path)
        elif path.is_dir():
            out[name] = None
        elif path.is_file():
            out[name] = path.read_bytes()
    return out


async def test_all_of_a_volume(lab: Lab, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    places = await lab.places()
    os.utime(places[b"/docs/b"][0], ns=(1_000_000_007, 2_000_000_009))
    os.chmod(places[b"/docs"][0], 0o700)
    os.utime(places[b"/docs"][0], ns=(5, 3_000_000_001))
    out = await export(lab, "/", dest)
    assert (out.losses, out.left_out) == ([], [])
    assert content_of(dest) == lab.content
    st = (dest / "docs" / "b").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_mtime_ns, st.st_nlink) == (0o640, 2_000_000_009, 2)
    assert (dest / "docs" / "deep" / "also-b").stat().st_ino == st.st_ino
    docs = (dest / "docs").stat()
    assert (stat.S_IMODE(docs.st_mode), docs.st_mtime_ns) == (0o700, 3_000_000_001)
    assert (dest / "docs" / "sparse").stat().st_blocks * 512 < 9 * BLOCK
    assert stat.S_ISFIFO((dest / "pipe").stat().st_mode)


async def test_one_file_one_directory_one_symlink(lab: Lab, tmp_path: Path) -> None:
    await export(lab, "/docs/deep/c", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == lab.content[b"/docs/deep/c"]
    (tmp_path / "in").mkdir()
    await export(lab, "docs/a", tmp_path / "in")
    await export(lab, "/docs/deep/", tmp_path / "in")
    await export(lab, "/link", tmp_path / "in")
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"a", "deep", "link"}
    assert (tmp_path / "in" / "deep" / "also-b").read_bytes() == lab.content[b"/docs/b"]
    assert os.readlink(tmp_path / "in" / "link") == "docs/a"


async def test_nothing_is_overwritten(lab: Lab, tmp_path: Path) -> None:
    dest = tmp_path / "small"
    dest.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        await export(lab, "/small", dest)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a").symlink_to("/nowhere")
    with pytest.raises(UsageError, match="exists already"):
        await export(lab, "/docs", tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        await export(lab, "/docs", dest)
    assert dest.read_bytes() == b"mine"
    assert os.readlink(tmp_path / "docs" / "a") == "/nowhere"


@pytest.mark.parametrize("path", ["/nothing", "/small/below", "/docs/../small"])
async def test_paths_that_lead_nowhere(lab: Lab, tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError):
        await export(lab, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_into_the_volume_itself(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(lab.root / "tree")
    for dest in (lab.root, lab.root / "x", tmp_path / "way", tmp_path / "way" / "y"):
        with pytest.raises(UsageError, match="inside the volume"):
            check_dest(lab.root, dest)
    check_dest(lab.root, tmp_path / "vaults")


async def test_damage_stops_it_and_leaves_no_half_file(lab: Lab, tmp_path: Path) -> None:
    flip((await lab.places())[b"/docs/b"][0], 64 + 3 * BLOCK)
    with pytest.raises(Damaged, match="tag: /docs/b"):
        await export(lab, "/docs/b", tmp_path / "b")
    assert not (tmp_path / "b").exists()


async def test_past_damage_when_asked(lab: Lab, tmp_path: Path) -> None:
    places = await lab.places()
    flip(places[b"/docs/b"][0], 64 + 3 * BLOCK)
    lab.sidecar(places[b"/docs/deep/c"][1]).unlink()
    lab.sidecar(places[b"/link"][1]).unlink()
    places[b"/empty"][0].unlink()
    (lab.tree / "stray").write_bytes(b"x")
    dest = tmp_path / "out"
    out = await export(lab, "/", dest, skip=True)
    assert {(loss.path, loss.reason, loss.lost_bytes) for loss in out.losses} >= {
        (b"/docs/deep/c", "missing-sidecar", ()),
        (b"/link", "missing-sidecar", ()),
        (b"/empty", "missing", ()),
    }
    [part] = [loss for loss in out.losses if loss.lost_bytes]
    assert part.path in (b"/docs/b", b"/docs/deep/also-b")
    assert part.lost_bytes == ((3 * BLOCK, BLOCK),)
    got, b = content_of(dest), lab.content[b"/docs/b"]
    assert isinstance(b, bytes)
    assert got[b"/docs/b"] == b[: 3 * BLOCK] + bytes(BLOCK) + b[4 * BLOCK :]
    gone = {b"/docs/b", b"/docs/deep/also-b", b"/docs/deep/c", b"/link", b"/empty"}
    assert {k: v for k, v in got.items() if k not in gone} == {k: v for k, v in lab.content.items() if k not in gone}
    assert b"/stray" not in got


async def test_a_damaged_directory_is_passed_over(lab: Lab, tmp_path: Path) -> None:
    flip((await lab.places())[b"/docs/deep"][0] / ".dir", 400)
    with pytest.raises(Damaged, match="/docs/deep"):
        await export(lab, "/docs", tmp_path / "out")
    out = await export(lab, "/docs", tmp_path / "again", skip=True)
    assert [loss.path for loss in out.losses] == [b"/docs/deep"]
    assert (tmp_path / "again" / "a").read_bytes() == lab.content[b"/docs/a"]


async def test_a_long_file_in_many_pieces(lab: Lab, tmp_path: Path) -> None:
    store = lab.store()
    volume = await lab.sample.open(store)
    data = os.urandom((5 << 20) + 333)
    attr, file = await volume.names.create(volume.root, b"long", 0o600, OWN)
    attr.inode.lookups += 1
    for at in range(0, len(data), 1 << 20):
        await file.write(at, data[at : at + (1 << 20)])
    await volume.files.release(attr.inode)
    await volume.close()
    store.close_store()
    await export(lab, "/long", tmp_path / "long")
    assert (tmp_path / "long").read_bytes() == data

    path = (await lab.places())[b"/long"][0]
    for block in (0, 300, 301, 1200):
        flip(path, 64 + block * BLOCK)
    report = await lab.check(deep=True)
    assert [finding.blocks for finding in report.damage] == [[(0, 1), (300, 2), (1200, 1)]]
    with pytest.raises(Damaged, match="block 0"):
        await export(lab, "/long", tmp_path / "again")
    await export(lab, "/long", tmp_path / "holes", skip=True)
    whole = bytearray(data)
    for block in (0, 300, 301, 1200):
        whole[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    assert (tmp_path / "holes").read_bytes() == bytes(whole)


async def test_a_full_disk_below_the_copy_is_said(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        await export(lab, "/docs/a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


async def test_a_long_copy_onto_a_full_disk(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy fails while the next pieces are on their way."""
    store = lab.store()
    volume = await lab.sample.open(store)
    attr, file = await volume.names.create(volume.root, b"long", 0o600, OWN)
    attr.inode.lookups += 1
    for at in range(6):
        await file.write(at << 20, bytes(1 << 20))
    await volume.files.release(attr.inode)
    await volume.close()
    store.close_store()
    real, calls = os.pwrite, 0

    def full_after_two(fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full_after_two)
    with pytest.raises(OSError, match="No space left"):
        await export(lab, "/long", tmp_path / "long")
    assert not (tmp_path / "long").exists()
