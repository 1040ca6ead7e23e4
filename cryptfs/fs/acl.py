"""POSIX ACLs as the kernel hands them over: version 2 of `posix_acl_xattr` (linux/posix_acl_xattr.h), little-endian.

The kernel enforces them and leaves three things to the filesystem: mode and ACL are two views of one thing, a
directory's default ACL is inherited, and an ACL that says no more than a mode is not kept (acl(5), posix_acl(9)).

A kept access ACL always has a mask, so that its entries for owner, mask and others *are* the mode's three digits. They
are taken from the mode whenever the ACL is read: chmod need not know whether there is one.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"

_VERSION = 2
_HEADER, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_NO_ID = 0xFFFFFFFF
_ORDER = (USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER)


@dataclass(frozen=True, slots=True)
class Acl:
    """Entries (tag, permissions 0 … 7, uid or gid) in the kernel's order."""

    entries: tuple[tuple[int, int, int], ...]

    def encode(self) -> bytes:
        """4 bytes and 8 per entry."""
        return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in self.entries)

    def permissions(self, tag: int) -> int | None:
        """Those of the one entry with this tag (not USER or GROUP)."""
        return next((permissions for each, permissions, _ in self.entries if each == tag), None)

    @property
    def is_minimal(self) -> bool:
        """It says nothing that a mode does not."""
        return len(self.entries) == 3

    @property
    def mode_bits(self) -> int:
        """The nine bits of the mode that go with it: those of the group are the mask's, if there is one."""
        group = self.permissions(MASK)
        if group is None:
            group = self.permissions(GROUP_OBJ)
        return (self.permissions(USER_OBJ) or 0) << 6 | (group or 0) << 3 | (self.permissions(OTHER) or 0)

    def with_mode(self, mode: int) -> Acl:
        """The same after chmod(2) to `mode`."""
        group_tag = GROUP_OBJ if self.permissions(MASK) is None else MASK
        new = {USER_OBJ: mode >> 6 & 7, group_tag: mode >> 3 & 7, OTHER: mode & 7}
        return Acl(tuple((tag, new.get(tag, permissions), who) for tag, permissions, who in self.entries))

    def inherited(self, mode: int) -> Acl:
        """As a default ACL: the access ACL of what is made with `mode`, which can only take away from it."""
        bits = self.mode_bits & mode
        return self.with_mode(bits)


def parse(data: bytes) -> Acl | None:
    """None for one without entries, which stands for none at all. Raises EINVAL, EOPNOTSUPP as posix_acl_valid does."""
    if len(data) < _HEADER.size or (len(data) - _HEADER.size) % _ENTRY.size:
        raise _error(errno.EINVAL)
    if _HEADER.unpack_from(data)[0] != _VERSION:
        raise _error(errno.EOPNOTSUPP)
    entries = tuple(_ENTRY.iter_unpack(data[_HEADER.size :]))
    if not entries:
        return None
    tags = [tag for tag, _, _ in entries]
    named = sum(tag in {USER, GROUP} for tag in tags)
    single = [tag for tag in tags if tag not in {USER, GROUP}]
    wanted = [USER_OBJ, GROUP_OBJ, *([MASK] if named or MASK in tags else []), OTHER]
    in_order = all(tag in _ORDER for tag in tags) and tags == sorted(tags, key=_ORDER.index)
    if not in_order or single != wanted or any(permissions > 7 for _, permissions, _ in entries):
        raise _error(errno.EINVAL)
    if any(who == _NO_ID for tag, _, who in entries if tag in {USER, GROUP}):
        raise _error(errno.EINVAL)
    return Acl(entries)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
