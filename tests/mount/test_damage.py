"""Damage on disk: EIO on what is damaged, one line in the log that says where and why, and everything else as it was.

The damage is done to a volume that was unmounted cleanly (a crash would forgive some of it), each kind to a file or
directory of its own, all before one mount: so it also shows that damage does not spread.
"""

from __future__ import annotations

import base64
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cryptfs.format.state import SLOT_BYTES
from tests.mount.box import Box, boxed
from tests.mount.syscalls import drop_pages, refused

pytestmark = pytest.mark.mount

BLOCK = 16 * 1024
CONTENT = b"".join(bytes([number]) * BLOCK for number in range(4)) + b"tail"


@dataclass(frozen=True)
class Below:
    """Where an object of the mount lies in the cipher directory."""

    vault: Path
    path: Path

    @property
    def sidecar(self) -> Path:
        with self.path.open("rb") as data:
            file_id = data.read(24)[8:].hex()
        return self.vault / "sidecars" / file_id[:2] / file_id

    @property
    def twin(self) -> Path:
        return self.sidecar.with_suffix(".twin")

    @property
    def log(self) -> Path:
        """A directory's."""
        return self.path / ".dir"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    """To `size` bytes, or by so many if it is negative."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def grow(path: Path) -> None:
    with path.open("ab") as out:
        out.write(b"\0" * 100)


def swap(one: Path, two: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    two.rename(one)
    spare.rename(two)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


# kind of damage -> (what is done, reason in the log)
FILES: dict[str, tuple[Callable[[Below, Below], object], str]] = {
    "no sidecar": (lambda f, _: f.sidecar.unlink(), "missing-sidecar"),
    "sidecar of 0 bytes": (lambda f, _: cut(f.sidecar, 0), "log-header"),
    "sidecar with half a header": (lambda f, _: cut(f.sidecar, 80), "log-header"),
    "sidecar without frames": (lambda f, _: cut(f.sidecar, 160), "frame"),
    "sidecar whose last frame is cut": (lambda f, _: cut(f.sidecar, -20), "frame"),
    "bit in the magic of a sidecar": (lambda f, _: flip(f.sidecar, 0), "log-header"),
    "bit in a sidecar's id": (lambda f, _: flip(f.sidecar, 20), "id-mismatch"),
    "bit in a wrapped log key": (lambda f, _: flip(f.sidecar, 40), "wrap"),
    "bit in a frame's head": (lambda f, _: flip(f.sidecar, 160 + 24), "frame"),
    "bit in a frame's payload": (lambda f, _: flip(f.sidecar, 160 + 152 + 30), "frame"),
    "bytes after the last frame": (lambda f, _: grow(f.sidecar), "frame"),
    "another file's sidecar": (lambda f, g: shutil.copy(g.sidecar, f.sidecar), "id-mismatch"),
    "exchanged sidecars": (lambda f, g: swap(f.sidecar, g.sidecar), "id-mismatch"),
    "data file of 0 bytes": (lambda f, _: cut(f.path, 0), "data-header"),
    "data file with half a header": (lambda f, _: cut(f.path, 30), "data-header"),
    "data file of a header": (lambda f, _: cut(f.path, 64), "size"),
    "data file cut by a byte": (lambda f, _: cut(f.path, -1), "size"),
    "data file grown": (lambda f, _: grow(f.path), "size"),
    "bit in a data file's id": (lambda f, _: flip(f.path, 10), "id-mismatch"),
    "bit in a data file's magic": (lambda f, _: flip(f.path, 3), "data-header"),
    "exchanged data files": (lambda f, g: swap(f.path, g.path), "id-mismatch"),
    "another file's data": (lambda f, g: shutil.copy(g.path, f.path), "id-mismatch"),
    "no twin": (lambda f, _: f.twin.unlink(), "missing-twin"),
    "twin of 0 bytes": (lambda f, _: cut(f.twin, 0), "short"),
    "bit in a twin": (lambda f, _: flip(f.twin, 5), "tag"),
    "a directory in place of the file": (lambda f, _: replace(f.path, Path.mkdir), "exchanged"),
    "a symlink in place of the file": (lambda f, g: replace(f.path, lambda path: path.symlink_to(g.path)), "exchanged"),
    "a fifo in place of the file": (lambda f, _: replace(f.path, os.mkfifo), "exchanged"),
    "data file gone": (lambda f, _: f.path.unlink(), "missing"),
}
BOTH = {"exchanged sidecars", "exchanged data files"}

DIRECTORIES: dict[str, tuple[Callable[[Below, Below], object], str]] = {
    "no log": (lambda d, _: d.log.unlink(), "missing-dir-log"),
    "log of 0 bytes": (lambda d, _: cut(d.log, 0), "log-header"),
    "log without frames": (lambda d, _: cut(d.log, 160), "dir-log"),
    "log whose last frame is cut": (lambda d, _: cut(d.log, -30), "dir-log"),
    "bit in a log's header": (lambda d, _: flip(d.log, 110), "wrap"),
    "bit in a log's first frame": (lambda d, _: flip(d.log, 190), "dir-log"),
    "bit in a log's last payload": (lambda d, _: flip(d.log, d.log.stat().st_size - 30), "dir-log"),
    "bytes after a log's last frame": (lambda d, _: grow(d.log), "dir-log"),
    "another directory's log": (lambda d, e: shutil.copy(e.log, d.log), "id-mismatch"),
    "directories exchanged": (lambda d, e: swap(d.path, e.path), "id-mismatch"),
    "directory gone": (lambda d, _: shutil.rmtree(d.path), "missing"),
}


def place(box: Box, clear: Path) -> Below:
    """Inode numbers are those of the cipher directory."""
    ino = clear.lstat().st_ino
    for where, dirs, files in os.walk(box.vault / "tree"):
        for name in dirs + files:
            path = Path(where, name)
            if path.lstat().st_ino == ino:
                return Below(box.vault, path)
    raise AssertionError(f"{clear} is not found below")


@dataclass(frozen=True)
class Damaged:
    box: Box
    inos: dict[str, int]
    """Of every victim before the damage, by name."""


@pytest.fixture(scope="module")
def damaged(template: Path, short_root: Path) -> Iterator[Damaged]:
    """A mounted volume with a victim of each kind of damage, and as many bystanders."""
    with boxed(short_root, template) as box:
        box.mount()
        for name in FILES:
            for path in (box.clear / name, box.clear / f"other of {name}"):
                path.write_bytes(CONTENT)
        with (box.clear / "bystander").open("wb") as out:
            out.write(CONTENT)
        for name in DIRECTORIES:
            for path in (box.clear / "dirs" / name, box.clear / "dirs" / f"other of {name}"):
                path.mkdir(parents=True)
                for number in range(3):
                    (path / f"file {number}").write_bytes(CONTENT)
        for name in ("text", "sidecar", "fine"):
            (box.clear / f"symlink, {name}").symlink_to(f"target of {name}")
        for name in ("no twin", "twin of 0 bytes", "bit in a twin"):
            with (box.clear / name).open("r+b", buffering=0) as out:
                os.fsync(out.fileno())
                os.pwrite(out.fileno(), CONTENT[:BLOCK], 0)
                os.fsync(out.fileno())
        names = [*FILES, *(f"dirs/{name}" for name in DIRECTORIES), "symlink, text", "symlink, sidecar"]
        inos = {name: (box.clear / name).lstat().st_ino for name in names}
        victims = {name: (place(box, box.clear / name), place(box, other_of(box.clear / name))) for name in names[:-2]}
        text, sidecar = (place(box, box.clear / f"symlink, {name}").path for name in ("text", "sidecar"))
        unknown = place(box, box.clear / "bystander").path
        box.umount()
        for name, (victim, other) in victims.items():
            damage, _ = DIRECTORIES[name.removeprefix("dirs/")] if name.startswith("dirs/") else FILES[name]
            damage(victim, other)
        edited = os.readlink(text)
        text.unlink()
        text.symlink_to("B" + edited[1:] if edited[0] == "A" else "A" + edited[1:])
        (symlink_sidecar(box.vault, sidecar)).unlink()
        # Entries nobody made: a copy under another name, and one that is not even a name of ours.
        shutil.copy(unknown, unknown.with_name("AAAA" + unknown.name[4:]))
        (box.vault / "tree" / "plain name").write_bytes(b"x")
        box.mount()
        yield Damaged(box, inos)


def other_of(path: Path) -> Path:
    return path.with_name(f"other of {path.name}")


def symlink_sidecar(vault: Path, link: Path) -> Path:
    log_id = base64.urlsafe_b64decode(os.readlink(link))[:16].hex()
    return vault / "sidecars" / log_id[:2] / log_id


def read_all(path: Path) -> bytes:
    path.stat()
    return path.read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(damaged: Damaged, name: str) -> None:
    box = damaged.box
    at = len(box.log())
    for _ in range(2):
        with refused(errno.EIO):
            read_all(box.clear / name)
    # Its number below may be another one by now; the line then names that of its directory.
    assert box.logged("ERROR inode ", FILES[name][1], since=0 if name in BOTH else at), box.log()[at:]
    if name in BOTH:
        with refused(errno.EIO):
            read_all(other_of(box.clear / name))
    else:
        assert read_all(other_of(box.clear / name)) == CONTENT


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_damaged_directory(damaged: Damaged, name: str) -> None:
    box = damaged.box
    at = len(box.log())
    path = box.clear / "dirs" / name
    for call in (
        lambda: os.listdir(path),
        (path / "file 0").read_bytes,
        (path / "new").touch,
        (path / "new").mkdir,
        path.rmdir,
    ):
        with refused(errno.EIO):
            call()
    assert box.logged("ERROR inode ", DIRECTORIES[name][1], since=at), box.log()[at:]
    other = other_of(path)
    if name == "directories exchanged":
        with refused(errno.EIO):
            os.listdir(other)
        return
    assert sorted(os.listdir(other)) == ["file 0", "file 1", "file 2"]
    assert (other / "file 1").read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["text", "sidecar"])
def test_a_damaged_symlink(damaged: Damaged, name: str) -> None:
    with refused(errno.EIO):
        os.readlink(damaged.box.clear / f"symlink, {name}")
    assert damaged.box.logged("ERROR inode ", "id-mismatch" if name == "text" else "missing-sidecar")
    assert os.readlink(damaged.box.clear / "symlink, fine") == "target of fine"


def test_a_listing_shows_what_there_was_and_nothing_that_was_added(damaged: Damaged) -> None:
    clear = damaged.box.clear
    expected = {"dirs", "bystander", *FILES, *(f"other of {name}" for name in FILES)}
    assert set(os.listdir(clear)) - {f"symlink, {name}" for name in ("text", "sidecar", "fine")} == expected
    assert set(os.listdir(clear / "dirs")) == {*DIRECTORIES, *(f"other of {name}" for name in DIRECTORIES)}


def test_the_rest_of_the_volume_works(damaged: Damaged) -> None:
    clear = damaged.box.clear
    assert read_all(clear / "bystander") == CONTENT
    (clear / "new").write_bytes(CONTENT)
    drop_pages(clear / "new")
    (clear / "new").rename(clear / "dirs" / "new")
    assert (clear / "dirs" / "new").read_bytes() == CONTENT
    (clear / "dirs" / "new").unlink()


def test_the_log_names_inodes_and_no_names(damaged: Damaged) -> None:
    box, log = damaged.box, damaged.box.log()
    with refused(errno.EIO):
        read_all(box.clear / "bit in a twin")
    assert box.logged("ERROR", f"inode {damaged.inos['bit in a twin']}:", "block 0")
    assert not [name for name in (*FILES, *DIRECTORIES, "bystander", "file 0") if len(name) > 9 and name in log]
    assert "Traceback" not in log, log[log.index("Traceback") - 200 :][:1500]


def test_one_damaged_block_costs_that_block_only(mounted: Box) -> None:
    file = mounted.clear / "file"
    file.write_bytes(CONTENT)
    below, ino = place(mounted, file), file.stat().st_ino
    mounted.umount()
    flip(below.path, 64 + 2 * BLOCK + 77)
    mounted.mount()
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)  # no read-ahead into the bad block
    try:
        for block in (0, 1, 3):
            assert os.pread(fd, BLOCK, block * BLOCK) == CONTENT[block * BLOCK :][:BLOCK]
        with refused(errno.EIO):
            os.pread(fd, BLOCK, 2 * BLOCK)
        assert mounted.logged("ERROR", f"inode {ino}:", "tag", "block 2")
    finally:
        os.close(fd)
    with file.open("r+b") as out:  # what is written anew is good again
        out.seek(2 * BLOCK)
        out.write(CONTENT[2 * BLOCK : 3 * BLOCK])
    drop_pages(file)
    assert file.read_bytes() == CONTENT
    mounted.remount()
    assert file.read_bytes() == CONTENT


def test_damage_done_while_it_is_mounted(mounted: Box) -> None:
    for name in ("flipped", "without sidecar", "gone", "fine"):
        (mounted.clear / name).write_bytes(CONTENT)
        drop_pages(mounted.clear / name)
    flip(place(mounted, mounted.clear / "flipped").path, 64 + 5)
    place(mounted, mounted.clear / "without sidecar").sidecar.unlink()
    place(mounted, mounted.clear / "gone").path.unlink()
    for name in ("flipped", "without sidecar"):
        with refused(errno.EIO):
            (mounted.clear / name).read_bytes()
    with refused(errno.EIO, errno.ENOENT):
        (mounted.clear / "gone").read_bytes()
    assert (mounted.clear / "fine").read_bytes() == CONTENT


def newest_slot(state: Path) -> int:
    """The slot that counts: the one with the higher sequence number."""
    raw = state.read_bytes()
    return max((0, 1), key=lambda slot: raw[slot * SLOT_BYTES + 8 : slot * SLOT_BYTES + 16])


def test_the_older_slot_of_the_state_is_not_needed(mounted: Box) -> None:
    (mounted.clear / "file").write_bytes(CONTENT)
    mounted.umount()
    state = mounted.vault / "state"
    flip(state, (1 - newest_slot(state)) * SLOT_BYTES + 17)
    mounted.mount()
    assert (mounted.clear / "file").read_bytes() == CONTENT


def test_the_older_slot_of_the_state_is_an_older_state(mounted: Box) -> None:
    (mounted.clear / "file").write_bytes(CONTENT)
    mounted.umount()
    state = mounted.vault / "state"
    flip(state, newest_slot(state) * SLOT_BYTES + 17)
    assert "an older state of the volume" in mounted.mount(code=25)
    mounted.run("check", "--accept-all", mounted.vault)
    mounted.mount()
    assert (mounted.clear / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("what", ["gone", "cut", "both slots"])
def test_a_damaged_state(box: Box, what: str) -> None:
    state = box.vault / "state"
    if what == "gone":
        state.unlink()
    elif what == "both slots":
        flip(state, 17)
        flip(state, SLOT_BYTES + 100)
    else:
        cut(state, 100)
    said = box.mount(code=11)
    assert said.startswith("error: ")
    assert "hint: " in said
    assert not box.is_mounted


@pytest.mark.parametrize("what", ["tree/.dir", "tree", "sidecars/7f"])
def test_a_part_of_the_volume_is_missing(box: Box, what: str) -> None:
    path = box.vault / what
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    ended = box.run("mount", box.vault, box.clear, code=None)
    if what == "tree/.dir":
        assert ended.returncode == 0, ended
        assert "warning: the root directory" in ended.stderr
        with refused(errno.EIO):
            os.listdir(box.clear)
        return
    assert ended.returncode == 11, ended
    assert what in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert not box.is_mounted
