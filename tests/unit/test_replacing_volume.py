"""Replacing a `volume` file: all or nothing, one editor at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cryptfs.errors import NotAVolume, StoreFailed, VolumeBusy
from cryptfs.ops import volume_file
from cryptfs.ops.volume_file import VolumeEdit

OLD, NEW = b"old" * 100, b"new" * 200


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    (tmp_path / "volume").write_bytes(OLD)
    (tmp_path / "volume").chmod(0o640)
    return tmp_path


def names(vault: Path) -> set[str]:
    return set(os.listdir(vault))


def test_a_new_file_in_the_old_ones_place(vault: Path) -> None:
    (vault / "volume.new").write_bytes(b"what a crash left")
    with VolumeEdit.of(vault) as edit:
        assert edit.data == OLD
        edit.replace(NEW)
        assert edit.data == NEW
    assert (vault / "volume").read_bytes() == NEW
    assert (vault / "volume").stat().st_mode & 0o777 == 0o640
    assert names(vault) == {"volume"}


def test_no_second_editor(vault: Path) -> None:
    with VolumeEdit.of(vault) as edit:
        with pytest.raises(VolumeBusy), VolumeEdit.of(vault):
            pass
        edit.replace(NEW)
    with VolumeEdit.of(vault) as edit:
        assert edit.data == NEW


def test_the_file_that_was_put_in_its_place_is_the_one_that_is_locked(
    vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open
    done: list[object] = []

    def open_then_replaced(path: object, flags: int, *rest: object, **more: object) -> int:
        fd = real(path, flags, *rest, **more)  # type: ignore[arg-type]
        if str(path) == str(vault / "volume") and len(done) < 2:
            done.append(path)
            if len(done) == 2:  # the second opening is the one that is locked
                (vault / "other").write_bytes(NEW)
                os.rename(vault / "other", vault / "volume")
        return fd

    monkeypatch.setattr(os, "open", open_then_replaced)
    with VolumeEdit.of(vault) as edit:
        assert edit.data == NEW
        monkeypatch.undo()
        with pytest.raises(VolumeBusy), VolumeEdit.of(vault):
            pass


@pytest.mark.parametrize("step", ["fsync", "rename", "open"])
def test_a_failing_disk_leaves_the_old_file(vault: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    with VolumeEdit.of(vault) as edit:
        real: Callable[..., object] = getattr(os, step)

        def failing(*args: object, **more: object) -> object:
            if step == "open" and not str(args[0]).endswith("volume.new"):
                return real(*args, **more)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, step, failing)
        with pytest.raises(StoreFailed, match="No space"):
            edit.replace(NEW)
        monkeypatch.undo()
        assert edit.data == OLD
    assert (vault / "volume").read_bytes() == OLD
    assert names(vault) == {"volume"}


KILLED = """
import os, sys
from pathlib import Path
from cryptfs.ops.volume_file import VolumeEdit
step = sys.argv[2]
real = getattr(os, step)
def last(*args, **more):
    if sys.argv[3] == "after":
        real(*args, **more)
    os._exit(9)
with VolumeEdit.of(Path(sys.argv[1])) as edit:
    setattr(os, step, last)
    edit.replace(b"new" * 200)
"""


@pytest.mark.parametrize(
    ("step", "when", "left"),
    [("fsync", "before", OLD), ("fsync", "after", OLD), ("rename", "before", OLD), ("rename", "after", NEW)],
)
def test_killed_between_any_two_calls(vault: Path, step: str, when: str, left: bytes) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(vault), step, when], check=False).returncode == 9
    assert (vault / "volume").read_bytes() == left
    with VolumeEdit.of(vault) as edit:
        edit.replace(NEW)
    assert (vault / "volume").read_bytes() == NEW
    assert names(vault) == {"volume"}


def test_destroyed(vault: Path) -> None:
    os.link(vault / "volume", vault / "other name")
    with VolumeEdit.of(vault) as edit:
        edit.overwrite()
    assert names(vault) == {"other name"}
    assert (vault / "other name").read_bytes() == bytes(len(OLD))


def test_no_volume(tmp_path: Path) -> None:
    with pytest.raises(NotAVolume), VolumeEdit.of(tmp_path):
        pass
    assert volume_file.FRESH not in names(tmp_path)
