"""An audit log that is written: a directory of files, each a sealed log, each beginning where the last one ended.

Nothing is ever overwritten. A crash between any two calls leaves:

- in `append`: the log as it was, or with the whole line, or with a torn frame after the last whole one (`kill -9` or a
  power cut in the middle of the write). The next writer leaves that as it is and begins a new file, whose first line
  says where the one before ended and how many bytes were torn;
- when a file is begun: a stray `.new`, which the next beginning replaces, or the new file, synced before it has its
  name: a file under its name always has a whole header and first line;
- when the oldest file is removed: one file too many, which the line `expire` before the removal allows to be missing.

Somebody may remove or exchange the file that is being written. Its name is looked up before each line, so no line goes
where nobody would find it: the log goes on in the next file, and the one that is gone is missed by who checks.

A line that could not be written completely is cut off again before the next one: a full disk leaves no torn line.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable
from typing import Any

from cryptfs import durable
from cryptfs.agent.audit_file import KEY_SUFFIX, Reading, Sealing, frame, key_beside, mac_of, read_frames, read_whole
from cryptfs.agent.places import private_state_dir
from cryptfs.crypto.mac import sha256
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.wrap import KEK_BYTES
from cryptfs.errors import AuditUnavailable, Damaged, NotPermitted
from cryptfs.format.audit import LINE_MAX_BYTES, AuditLine
from cryptfs.format.log import HEADER_BYTES, LogHeader, decode_header
from cryptfs.paths import private_dir
from cryptfs.ports import Clock, Random
from cryptfs.types import ID_BYTES

log = logging.getLogger(__name__)

FILE_BYTES = 4 << 20
"""A file that is longer gets no more lines."""
FILES_KEPT = 128
"""512 MiB: some 4 TiB of streaming reads, or a million requests of other kinds."""
NUMBER_MAX = 10**8 - 1
"""Names have eight digits: one of more would be nobody's to read."""
AGENT_LOG = "agent"
"""The directory of the agent's own log; those of volumes are named by their ids."""

_NAME = re.compile(r"([0-9]{8})\.log\Z")


def file_name(number: int) -> str:
    """The name of the log's file of this number."""
    return f"{number:08d}.log"


def file_numbers(directory: str) -> list[int]:
    """The numbers of the files there are, in order. Raises OSError."""
    return sorted(int(match[1]) for name in os.listdir(directory) if (match := _NAME.match(name)))


class AuditLog:
    """One log, open for appending. Every call may block for a moment; `sync` for as long as the disk takes."""

    def __init__(
        self, directory: str, sealing: Sealing, random: Random, clock: Clock, *,
        file_bytes: int = FILE_BYTES, files_kept: int = FILES_KEPT,
    ) -> None:  # fmt: skip
        """Make or continue the log in `directory`; `sealing` is used here and when a file is begun.

        Raises `AuditUnavailable`.
        """
        self.directory = directory
        self.sealing = sealing
        self._random = random
        self._clock = clock
        self._file_bytes = file_bytes
        self._files_kept = files_kept
        self._fd = -1
        self._header: LogHeader | None = None
        self._key: Secret | None = None
        self._number = 0
        self._path = ""
        self._identity = (0, 0)
        self._end = 0
        self._torn = self._full = False
        self._generation = 0
        self._mac = bytes(32)
        self.dirty = False
        """Whether something was written since the last `sync`."""
        self.damage: str | None = None
        """What was found wrong with the last file when the log was opened."""
        try:
            prepare(os.path.dirname(directory))
            private_dir(directory)
            self._continue()
        except OSError as error:
            self.close()
            raise AuditUnavailable(f"the audit log {directory} cannot be used: {error.strerror}") from error
        except NotPermitted as error:
            self.close()
            raise AuditUnavailable(str(error)) from error
        except BaseException:
            self.close()
            raise

    @property
    def place(self) -> tuple[int, int, str]:
        """Where the log ends: file, number of the last line, its MAC in hexadecimal."""
        return self._number, self._generation, self._mac.hex()

    def append(self, line: bytes) -> None:
        """Write one encoded line. Raises `AuditUnavailable`; then the log is as it was.

        That also for a line that readers would take for damage: they stop at one of more than `LINE_MAX_BYTES`.
        """
        if len(line) > LINE_MAX_BYTES:
            raise AuditUnavailable(f"a line of {len(line)} bytes is too long for the audit log {self.directory}")
        if self._fd < 0:
            raise AuditUnavailable(f"the audit log {self.directory} is closed")
        try:
            self._mend()
            if self._is_gone():
                self._go_on_elsewhere()
            elif self._full or self._end > self._file_bytes:
                self._begin(self._ending())
            self._write(line)
        except OSError as error:
            raise AuditUnavailable(f"the audit log {self.directory} cannot be written: {error.strerror}") from error
        except NotPermitted as error:
            raise AuditUnavailable(str(error)) from error

    @property
    def number(self) -> int:
        """That of the file being written, whether it still has its name or not."""
        return self._number

    def end_of(self, number: int) -> int | None:
        """How many bytes of the file of this number were written; None if it is not the one being written."""
        return self._end if number == self._number else None

    def reseal(self, sealing: Sealing) -> None:
        """Begin later files under these KEKs: the ones given before are about to be wiped."""
        self.sealing = sealing

    def syncing(self) -> Callable[[], None]:
        """What makes everything written so far durable: a call that blocks, for a thread, and may raise OSError.

        It has a descriptor of its own: the log may go on, and be closed, meanwhile.
        """
        self.dirty = False
        fd = os.dup(self._fd)

        def sync() -> None:
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

        return sync

    def sync_failed(self) -> None:
        """Go on in a new file: what a kernel could not write back and has dropped it does not write again."""
        self._full = True

    def close(self) -> None:
        """Close the file, wipe its key."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._key is not None:
            self._key.wipe()

    # writing ---------------------------------------------------------------------------------------------------

    def _write(self, line: bytes) -> None:
        assert self._header is not None
        assert self._key is not None
        whole = frame(self._key.view(), self._header.log_id, self._generation + 1, self._mac, line)
        done = 0
        try:
            while done < len(whole):
                done += os.write(self._fd, whole[done:])
        except OSError:
            if done:
                self._torn = True
                with contextlib.suppress(OSError):
                    self._mend()
            raise
        self._end += len(whole)
        self._generation += 1
        self._mac = mac_of(whole)
        self.dirty = True

    def _mend(self) -> None:
        """Cut off what a failed write left."""
        if self._torn:
            os.ftruncate(self._fd, self._end)
            self._torn = False

    def _is_gone(self) -> bool:
        """Whether the file's name is another file's now, or nobody's."""
        try:
            there = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return True
        return (there.st_ino, there.st_dev) != self._identity

    def _go_on_elsewhere(self) -> None:
        """Begin a file after the one that is gone; if the whole directory is, make it anew."""
        log.error("audit log: %s was removed or exchanged; it goes on in a new file", self._path)
        prepare(os.path.dirname(self.directory))
        private_dir(self.directory)
        # Whatever lies there now is evidence: no name of it is taken.
        newest = max([self._number, *file_numbers(self.directory)])
        self._begin({**self._ending(), "gone": self._end}, after=newest)

    def _opened(self, fd: int, number: int) -> None:
        """The file that is written from now on."""
        self._fd, self._number = fd, number
        self._path = os.path.join(self.directory, file_name(number))
        there = os.fstat(fd)
        self._identity = (there.st_ino, there.st_dev)

    def _begin(self, previous: dict[str, Any] | None, after: int | None = None) -> None:
        """Begin the next file, or the one after `after`; on any error the log stays in the one it is in."""
        number = (self._number if after is None else after) + 1
        if number > NUMBER_MAX:
            raise AuditUnavailable(f"the audit log {self.directory} has a file of the highest number there is")
        key = Secret.of(self._random(KEK_BYTES))
        header = self.sealing.new_header(self._random(ID_BYTES), bytes(key.view()))
        detail: dict[str, str | int | bool] = {"file": number}
        if previous is not None:
            detail |= {f"previous-{name}": value for name, value in previous.items()}
        line = AuditLine(self._clock.time_ns(), "begin", "ok", detail=detail).encode()
        encoded = header.encode()
        first = frame(key.view(), header.log_id, self._generation + 1, sha256(encoded), line, first=True)
        path = os.path.join(self.directory, file_name(number))
        fresh = path + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(fresh, flags, 0o600)
        try:
            _take(fd, self.directory)
            durable.write_all(fd, encoded + first)
            os.fsync(fd)
            # link, not rename: a file that has the name already is evidence, whatever it is.
            os.link(fresh, path)
            os.unlink(fresh)
            durable.sync_directory(self.directory)
        except BaseException:
            os.close(fd)
            key.wipe()
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
        old_fd, old_key = self._fd, self._key
        self._key, self._header = key, header
        self._opened(fd, number)
        self._end, self._torn, self._full = len(encoded) + len(first), False, False
        self._generation, self._mac = self._generation + 1, mac_of(first)
        if old_fd >= 0:
            with contextlib.suppress(OSError):
                os.fdatasync(old_fd)
            os.close(old_fd)
        if old_key is not None:
            old_key.wipe()
        self._expire()

    def _ending(self) -> dict[str, Any]:
        return {"line": self._generation, "mac": self._mac.hex(), "end": self._end}

    def _expire(self) -> None:
        """Remove the oldest files; the line that says so is durable first."""
        surplus = file_numbers(self.directory)[: -self._files_kept]
        if not surplus:
            return
        line = AuditLine(self._clock.time_ns(), "expire", "ok", detail={"up-to-file": surplus[-1]})
        self._write(line.encode())
        os.fdatasync(self._fd)
        for number in surplus:
            path = os.path.join(self.directory, file_name(number))
            os.unlink(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + KEY_SUFFIX)

    # opening ---------------------------------------------------------------------------------------------------

    def _continue(self) -> None:
        numbers = file_numbers(self.directory)
        if not numbers:
            self._begin(None)
            return
        self._number = numbers[-1]
        path = os.path.join(self.directory, file_name(self._number))
        try:
            raw = read_whole(path)
            header = decode_header(raw[:HEADER_BYTES])
            key = self.sealing.key_of(header) or key_beside(path, header, self.sealing)
        except Damaged:
            raw, header, key = b"", None, None
        reading = Reading()
        if key is None:
            reading.fault = "header"
        else:
            for _ in read_frames(raw, key.view(), reading):
                pass
        self._generation = max(reading.generation, self._generation)
        self._mac = reading.mac or bytes(32)
        if reading.fault is None and header is not None and key is not None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._opened(os.open(path, flags), self._number)
            _take(self._fd, self.directory)
            self._header, self._key, self._end = header, key, reading.end
            return
        if key is not None:
            key.wipe()
        if reading.fault != "torn":
            self.damage = f"{path}: {reading.fault} at byte {reading.at}"
            log.error("audit log: %s; it goes on in a new file", self.damage)
        previous: dict[str, Any] = {"line": reading.generation, "mac": self._mac.hex(), "end": reading.end}
        previous[reading.fault or "torn"] = max(0, len(raw) - reading.end)
        self._begin(previous)


def _take(fd: int, directory: str) -> None:
    """Two writers would break the chain: whoever has the newest file open for writing holds its lock (flock(2))."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AuditUnavailable(f"another key agent of this user writes the audit log {directory}") from None


def prepare(audit_dir: str) -> None:
    """Make the directory of all logs, in the state directory, unless it is there. Raises `AuditUnavailable`."""
    private_state_dir(audit_dir, "the audit log", AuditUnavailable)


def local_sealing(audit_dir: str, random: Random) -> Sealing:
    """What the agent's own log is sealed with: the key in `audit_dir`, made if there is none. Raises OSError.

    A crash while it is made leaves a `.new`, never a short key. Raises `AuditUnavailable` if it is not 32 bytes.
    """
    path = os.path.join(audit_dir, "agent.key")
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, os.O_RDONLY | flags)
    except FileNotFoundError:
        fresh = path + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o600)
        with os.fdopen(fd, "r+b") as file:
            file.write(random(KEK_BYTES))
            file.flush()
            os.fsync(fd)
        os.rename(fresh, path)
        durable.sync_directory(audit_dir)
        fd = os.open(path, os.O_RDONLY | flags)
    with os.fdopen(fd, "rb") as file:
        data = file.read(KEK_BYTES + 1)
    if len(data) != KEK_BYTES:
        raise AuditUnavailable(f"{path} is no key of {KEK_BYTES} bytes; move it and the directory agent/ away")
    return Sealing({1: Secret.of(data)}, 1, bytes(ID_BYTES))
