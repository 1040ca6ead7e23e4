"""An audit log on disk: what is written is read again, and whatever is done to it afterwards is found."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cryptfs.agent.audit_check import check_file
from cryptfs.agent.audit_file import Reading, Sealing, read_frames
from cryptfs.agent.audit_log import AuditLog, file_name, file_numbers
from cryptfs.crypto.secret import Secret
from cryptfs.errors import AuditUnavailable
from cryptfs.format.audit import LINE_MAX_BYTES, AuditLine, Touched, decode_line
from cryptfs.format.log import HEADER_BYTES
from cryptfs.ops.audit_verify import FileReport, Verdict, judge
from tests.agent.conftest import StillClock

VOLUME = b"v" * 16
FRAME_OVERHEAD = 160


def sealing() -> Sealing:
    return Sealing({1: Secret.of(b"k" * 32)}, 1, VOLUME)


@pytest.fixture
def directory(short_tmp: Path) -> str:
    return str(short_tmp / "audit" / VOLUME.hex())


def opened(directory: str, *, file_bytes: int = 1 << 20, files_kept: int = 100) -> AuditLog:
    return AuditLog(directory, sealing(), os.urandom, StillClock(), file_bytes=file_bytes, files_kept=files_kept)


def line(number: int) -> bytes:
    return AuditLine(number, "unwrap", "ok", VOLUME, None, (Touched(b"f" * 16, "block", 2, ((number, 2),)),)).encode()


def written(directory: str, count: int = 20, *, file_bytes: int = 1 << 20) -> None:
    log = opened(directory, file_bytes=file_bytes)
    for number in range(count):
        log.append(line(number))
    log.close()


def verdict(directory: str) -> Verdict:
    reports = []
    for number in file_numbers(directory):
        said = check_file(directory, number, sealing(), None)
        assert not said.pop("places")
        reports.append(FileReport(number=number, places=(), **said))
    return judge(VOLUME, reports)


def numbers(directory: str) -> list[int]:
    """Of the lines that `line` made, as far as they can be read."""
    out = []
    for number in file_numbers(directory):
        raw = Path(directory, file_name(number)).read_bytes()
        for each in read_frames(raw, None, Reading()):
            decoded = decode_line(each.line)
            if decoded.verb == "unwrap":
                out.append(decoded.time_ns)
    return out


def first(directory: str, number: int = 1) -> Path:
    return Path(directory, file_name(number))


def test_what_was_written_is_intact_and_goes_on(directory: str) -> None:
    written(directory, 20)
    written(directory, 5)
    assert numbers(directory) == [*range(20), *range(5)]
    found = verdict(directory)
    assert (found.files, found.lines, found.damage, found.notes) == (1, 26, [], [])


def test_files_are_begun_by_size_and_the_chain_goes_on(directory: str) -> None:
    written(directory, 60, file_bytes=4000)
    assert len(file_numbers(directory)) > 4
    assert numbers(directory) == list(range(60))
    assert verdict(directory).damage == []


def test_the_oldest_files_go_and_that_is_on_the_record(directory: str) -> None:
    log = opened(directory, file_bytes=2000, files_kept=3)
    for number in range(100):
        log.append(line(number))
    log.close()
    assert len(file_numbers(directory)) <= 4
    assert verdict(directory).damage == []
    first(directory, file_numbers(directory)[0]).unlink()
    assert any("missing" in text for text in verdict(directory).damage)


def test_a_crash_in_any_byte_of_the_last_line_is_torn_and_hides_nothing(directory: str) -> None:
    written(directory, 3)
    path = first(directory)
    before = len(path.read_bytes())
    written(directory, 1)
    whole = path.read_bytes()
    ends = {*range(before + 1, before + 8), *range(before + 8, len(whole), 11), *range(len(whole) - 12, len(whole))}
    for end in sorted(ends):
        path.write_bytes(whole[:end])
        found = verdict(directory)
        assert found.damage == [], end
        assert len(found.notes) == 1
        assert found.lines == 4
        # The next agent goes on, and leaves what it found as it is.
        log = opened(directory)
        assert log.damage is None
        log.append(line(77))
        log.close()
        assert path.read_bytes() == whole[:end]
        assert numbers(directory) == [0, 1, 2, 77]
        found = verdict(directory)
        assert found.damage == []
        assert "torn by a crash" in found.notes[0]
        first(directory, 2).unlink()
    path.write_bytes(whole)
    assert verdict(directory).notes == []


def test_zeros_after_a_power_cut_are_torn(directory: str) -> None:
    written(directory)
    with first(directory).open("ab") as file:
        file.write(bytes(700))
    assert verdict(directory).damage == []
    assert "torn" in verdict(directory).notes[0]


def frames(raw: bytes) -> list[tuple[int, int]]:
    """(start, end) of each frame."""
    reading, start, out = Reading(), HEADER_BYTES, []
    for each in read_frames(raw, None, reading):
        out.append((start, each.end))
        start = each.end
    return out


def edited(raw: bytes) -> bytes:
    return raw.replace(b"[3,2]", b"[4,2]", 1)


def with_a_bit_flipped_anywhere(raw: bytes) -> list[bytes]:
    return [raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :] for at in range(0, len(raw), 13)]


def removed(raw: bytes) -> bytes:
    start, end = frames(raw)[5]
    return raw[:start] + raw[end:]


def repeated(raw: bytes) -> bytes:
    start, end = frames(raw)[5]
    return raw[:end] + raw[start:end] + raw[end:]


def exchanged(raw: bytes) -> bytes:
    (a, b), (c, d) = frames(raw)[5:7]
    return raw[:a] + raw[c:d] + raw[a:b] + raw[d:]


def put_in(raw: bytes) -> bytes:
    at = frames(raw)[5][0]
    return raw[:at] + b"\n" + raw[at:]


def made_to_look_torn(raw: bytes) -> bytes:
    """A head whose length reaches past the end would hide every line behind it."""
    start, _ = frames(raw)[5]
    return raw[: start + 48] + (1 << 20).to_bytes(4, "big") + raw[start + 52 :]


def cut_out_of_the_middle(raw: bytes) -> bytes:
    start, _ = frames(raw)[5]
    return raw[: start + 100] + raw[start + 120 :]


def appended(raw: bytes) -> bytes:
    return raw + b"x" * 40


def header_of_another_kind(raw: bytes) -> bytes:
    return raw[:8] + b"\1" + raw[9:]


CHANGES: list[Callable[[bytes], bytes]] = [
    edited, removed, repeated, exchanged, put_in, made_to_look_torn, cut_out_of_the_middle, appended,
    header_of_another_kind,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_found_and_stays_found(directory: str, change: Callable[[bytes], bytes]) -> None:
    written(directory)
    path = first(directory)
    path.write_bytes(change(path.read_bytes()))
    assert verdict(directory).damage, "not found"
    # The agent goes on, and does not make it good by that.
    log = opened(directory)
    assert log.damage is not None
    log.append(line(77))
    log.close()
    assert verdict(directory).damage, "forgotten"
    assert numbers(directory)[-1] == 77


def test_any_bit(directory: str) -> None:
    written(directory, 6)
    path = first(directory)
    for changed in with_a_bit_flipped_anywhere(path.read_bytes()):
        path.write_bytes(changed)
        assert verdict(directory).damage


def test_a_file_that_is_missing_cut_short_exchanged_or_from_another_log_is_found(directory: str) -> None:
    written(directory, 60, file_bytes=4000)
    two, three = first(directory, 2), first(directory, 3)
    kept = two.read_bytes()
    two.unlink()
    assert any("file 2: missing" in text for text in verdict(directory).damage)
    end = frames(kept)[-2][1]
    two.write_bytes(kept[:end])
    assert any("1 lines less than" in text for text in verdict(directory).damage)
    two.write_bytes(kept[:-3])
    assert any("file 2" in text for text in verdict(directory).damage)
    two.write_bytes(three.read_bytes())
    assert any("not that of file 2" in text for text in verdict(directory).damage)
    two.write_bytes(kept)
    assert verdict(directory).damage == []


def test_without_the_key_nothing_can_be_written_that_passes(directory: str) -> None:
    written(directory)
    other = directory + "x"
    log = AuditLog(other, Sealing({1: Secret.of(b"x" * 32)}, 1, VOLUME), os.urandom, StillClock())
    log.append(line(1))
    log.close()
    first(directory).write_bytes(first(other).read_bytes())
    assert verdict(directory).damage == ["file 1, byte 0: its header is not what was written"]


def test_a_disk_that_fills_up_refuses_and_resumes(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(directory)
    log.append(line(0))
    real, room = os.write, 100

    def full(fd: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(fd, data[:room])
        room -= done
        return done

    monkeypatch.setattr(os, "write", full)
    for _ in range(3):
        with pytest.raises(AuditUnavailable, match="No space left"):
            log.append(line(1))
        room = 57
    monkeypatch.setattr(os, "write", real)
    log.append(line(2))
    log.close()
    assert numbers(directory) == [0, 2]
    found = verdict(directory)
    assert (found.damage, found.notes) == ([], [])


def test_a_file_that_cannot_be_begun_leaves_the_log_where_it_is(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(directory, file_bytes=100)
    log.append(line(0))
    real = os.fsync

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(AuditUnavailable):
        log.append(line(1))
    monkeypatch.setattr(os, "fsync", real)
    log.append(line(2))
    log.close()
    assert numbers(directory) == [0, 2]
    assert verdict(directory).damage == []
    assert not [name for name in os.listdir(directory) if name.endswith(".new")]


def test_two_writers_are_refused(directory: str) -> None:
    log = opened(directory)
    with pytest.raises(AuditUnavailable, match="another key agent"):
        opened(directory)
    log.close()
    opened(directory).close()


def test_what_is_no_directory_of_ours_is_refused(directory: str) -> None:
    written(directory)
    Path(directory).chmod(0o755)
    with pytest.raises(AuditUnavailable, match="0755"):
        opened(directory)
    Path(directory).chmod(0o700)
    first(directory).chmod(0o600)
    os.rename(first(directory), first(directory, 7))
    assert verdict(directory).damage


def test_a_line_that_readers_would_not_take_is_not_written(directory: str) -> None:
    log = opened(directory)
    with pytest.raises(AuditUnavailable, match="too long"):
        log.append(b"x" * LINE_MAX_BYTES + b"\n")
    log.append(line(1))
    log.close()
    assert numbers(directory) == [1]
    assert not verdict(directory).damage


@pytest.mark.parametrize("word", ['bl"ock', "block\n", "", "Block", "b" * 33])
def test_a_word_that_is_none_does_not_get_into_a_line(word: str) -> None:
    with pytest.raises(ValueError, match="no word"):
        AuditLine(1, "unwrap", "ok", VOLUME, None, (Touched(b"f" * 16, word, 1),)).encode()
    with pytest.raises(ValueError, match="no word"):
        AuditLine(1, word, "ok").encode()


def test_no_file_is_begun_that_no_reader_would_find(directory: str) -> None:
    written(directory, 1)
    (Path(directory) / "99999999.log").write_bytes(b"not ours")
    with pytest.raises(AuditUnavailable, match="highest number"):
        opened(directory)
