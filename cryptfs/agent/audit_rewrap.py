"""Keeping old files of an audit log readable when the KEK that their keys are wrapped under is destroyed.

A file's header is part of its chain and stays as it is. Beside the file comes `<number>.key`: u32 KEK version and the
file's key (40 bytes wrapped) under it, for the same purpose and log id. A crash leaves a
stray `.key.new`, or the whole.
"""

from __future__ import annotations

import contextlib
import os

from cryptfs import durable
from cryptfs.agent.audit_file import KEY_SUFFIX, Sealing, key_beside
from cryptfs.agent.audit_log import file_name, file_numbers
from cryptfs.errors import AuditUnavailable, Damaged
from cryptfs.format.log import HEADER_BYTES, decode_header


def rewrap_files(directory: str, sealing: Sealing) -> int:
    """Wrap the keys of all files under the newest KEK; how many were. Blocks. Raises `AuditUnavailable`.

    A file whose key cannot be had is left out: `audit verify` says so already.
    """
    done = 0
    try:
        for number in file_numbers(directory):
            path = os.path.join(directory, file_name(number))
            with open(path, "rb") as file:
                raw = file.read(HEADER_BYTES)
            try:
                header = decode_header(raw)
            except Damaged:
                continue
            if header.kek_version == sealing.kek_version or sealing.is_newest(path):
                continue
            key = sealing.key_of(header) or key_beside(path, header, sealing)
            if key is None:
                continue
            with key:
                again = sealing.new_header(header.log_id, bytes(key.view()))
            _write(path + KEY_SUFFIX, again.kek_version.to_bytes(4, "big") + again.log_wrapped)
            done += 1
        if done:
            durable.sync_directory(directory)
    except FileNotFoundError:
        return done
    except OSError as error:
        raise AuditUnavailable(f"the audit log {directory} cannot be written: {error.strerror}") from error
    return done


def _write(path: str, data: bytes) -> None:
    fresh = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    durable.write_new(fresh, data)
    os.rename(fresh, path)
