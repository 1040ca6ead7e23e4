"""`cryptfs info` on volume files made for the test: needs no agent and no key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cryptfs.errors import NotAVolume, StoreFailed, VolumeDamaged
from cryptfs.format.volume import FILE_MAX_BYTES, MAC_BYTES, Protector, Volume, WrappedKey, encode_volume
from cryptfs.ops.info import read_info
from tests.cli.conftest import Cryptfs

PROTECTOR = Protector(
    protector_id=bytes(range(16)),
    kind="passphrase",
    label="mine\x1b[2J",
    created_s=1_700_000_000,
    params={"kdf": "argon2id", "salt": b"\xab" * 16, "memory_kib": 65536, "iterations": 3, "lanes": 4},
    keks=(WrappedKey(1, bytes(60)),),
)
VOLUME = Volume(
    volume_id=b"\x11" * 16,
    serial=1,
    created_s=1_700_000_000,
    block_size=16384,
    features=(),
    root_dir_id=b"\x22" * 16,
    kek_version=1,
    volume_key=WrappedKey(1, bytes(40)),
    protectors=(PROTECTOR,),
)


@pytest.fixture
def volume_file(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    path.write_bytes(encode_volume(VOLUME) + bytes(MAC_BYTES))
    return path


def test_the_document_has_what_the_contract_lists(cryptfs: Cryptfs, volume_file: Path) -> None:
    assert json.loads(cryptfs.run("info", volume_file.parent, "--json").stdout) == {
        "format_version": 1,
        "volume_id": "11" * 16,
        "created_s": 1_700_000_000,
        "serial": 1,
        "block_size": 16384,
        "features": [],
        "kek_version": 1,
        "domains": [],
        "protectors": [
            {
                "id": "000102030405060708090a0b0c0d0e0f",
                "kind": "passphrase",
                "label": "mine\x1b[2J",
                "created_s": 1_700_000_000,
                "params": {"kdf": "argon2id", "salt": "ab" * 16, "memory_kib": 65536, "iterations": 3, "lanes": 4},
                "kek_versions": [1],
            }
        ],
    }


def test_people_get_lines_without_control_characters(cryptfs: Cryptfs, volume_file: Path) -> None:
    shown = cryptfs.run("info", volume_file.parent).stdout
    assert "block size      16384 bytes\n" in shown
    assert "created         2023-11-14 22:13 UTC\n" in shown
    assert "(mine\\x1b[2J): kdf argon2id, memory_kib 65536, iterations 3, lanes 4" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [(0, b"X", 11), (9, b"\x02", 12), (20, b"\xff", 11), (-33, None, 11)],
    ids=["magic", "newer format", "body", "cut short"],
)
def test_a_file_that_cannot_be_read(
    cryptfs: Cryptfs, volume_file: Path, offset: int, value: bytes | None, code: int
) -> None:
    data = bytearray(volume_file.read_bytes())
    if value is None:
        del data[offset:]
    else:
        data[offset : offset + 1] = value
    volume_file.write_bytes(data)
    ended = cryptfs.run("info", volume_file.parent, code=code)
    assert ended.stderr.startswith("error: ")
    assert "\nhint: " in ended.stderr


def test_an_unknown_feature_is_refused(cryptfs: Cryptfs, volume_file: Path) -> None:
    data = volume_file.read_bytes().replace(b"\xa8features\x90", b"\xa8features\x91\xa1x")
    volume_file.write_bytes(data[:12] + (len(data) - 48).to_bytes(4, "big") + data[16:])
    assert "features this program does not know: x" in cryptfs.run("info", volume_file.parent, code=12).stderr


def test_what_is_no_volume(cryptfs: Cryptfs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in (
        (tmp_path, "holds no file"),
        (tmp_path / "x", "does not exist"),
        (tmp_path / "file", "no directory"),
    ):
        assert why in cryptfs.run("info", path, code=10).stderr
        with pytest.raises(NotAVolume, match=why):
            read_info(path)


def test_odd_things_in_the_place_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "volume"
    os.mkfifo(path)
    with pytest.raises(VolumeDamaged, match="too short"):
        read_info(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(StoreFailed):
        read_info(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreFailed, match="Is a directory"):
        read_info(tmp_path)
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(FILE_MAX_BYTES + 1)
    with pytest.raises(VolumeDamaged, match="too long"):
        read_info(tmp_path)


def test_a_date_that_no_calendar_has() -> None:
    from cryptfs.cli.info import day

    assert day(0) == "1970-01-01 00:00 UTC"
    assert day(2**62) == str(2**62)
