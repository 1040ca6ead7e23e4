"""Where a mount answers otherwise than the ext4 below it: patterns over the prober's lines, each with its reason.

docs/COMPATIBILITY.md lists the same for people. A difference that no longer occurs fails the test that looks for it, so
each pattern is as narrow as what it explains, and says so if it may stay away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

FALLOCATE = "the binding has no handler for fallocate; EOPNOTSUPP makes glibc's posix_fallocate write zeros instead"
GROUP_EXEC = "the kernel's FUSE code takes set-group-id from a written file only if its group may execute it"
LOCAL_TIME = "with the writeback cache the kernel keeps mtime and ctime of regular files itself"
ATIME = "reading from the page cache does not reach the daemon; reading ciphertext for any reason does"
SOMETIMES = "whether the daemon reads below at that moment depends on what the kernel and it have in memory"


@dataclass(frozen=True)
class Expected:
    """A difference. `sometimes`: why it may stay away; empty for one that must be seen."""

    pattern: str
    reason: str
    sometimes: str = ""

    @property
    def scenario(self) -> str:
        return self.pattern.split(" / ")[0]

    def explains(self, line: str) -> bool:
        return re.search(self.pattern, line) is not None


def _each(pattern: str, words: Iterable[str], reason: str, sometimes: str = "") -> tuple[Expected, ...]:
    return tuple(Expected(pattern.replace("%", word), reason, sometimes) for word in words)


_WRITTEN = ("write", "ftruncate", "ftruncate to the same size", "truncate", "append", "copy_file_range")
_NO_GROUP_EXEC = ("2745", "2766", "2644", "6666", "7644")
_FAR = (
    r"-2147483648, 1",
    r"-2147483649, 1",
    "15032385535, 6",
    "15032385536, 7",
    "100000000000, 8",
    r"-100000000000, 9",
)

EXPECTED: tuple[Expected, ...] = (
    *_each("rare_calls / fallocate % ", ("plain", "keep size", "punch", "collapse", "zero", "insert"), FALLOCATE),
    Expected("rare_calls / FS_IOC_GETFLAGS ", "the binding has no handler for ioctl"),
    Expected("rare_calls / tmpfile ", "the binding has no handler; programs fall back to a name and unlink"),
    *_each(
        "subdirectories_of_themselves / rename with flags % ", "45", "RENAME_WHITEOUT is overlayfs's and is not stored"
    ),
    *_each("set_id_bits / descriptor's after % of 2767 by ben ", _WRITTEN, GROUP_EXEC),
    *_each("set_id_bits / descriptor's after % of 2666 by ben ", _WRITTEN, GROUP_EXEC),
    *_each("set_id_bits / chown of nothing of % by ben ", ("2767", "2666"), GROUP_EXEC),
    *(
        expected for what in ("write", "writev to append", "cut", "grow", "same size", "direct")
        for expected in _each(f"written_set_id / lstat file after {what} % by ann ", _NO_GROUP_EXEC, GROUP_EXEC)
    ),
    *_each("chown_of_set_id / reg % to nothing by ben ", ("2745", "2766", "2644"), GROUP_EXEC),
    *_each("chown_of_set_id / fifo % to nothing by ben ", ("2745", "2766", "2644"), GROUP_EXEC),
    Expected("moved_by_names / unlink one name of symlink: times of #0 ", ATIME, SOMETIMES),
    *_each("moved_by_names / rename symlink%: times of #[02] ", (" over", " within"), ATIME, SOMETIMES),
    Expected("moved_by_attributes / chown symlink [-:0-9]+: times of #0 ", ATIME),
    *_each(
        "moved_by_content / %: times of #0 ",
        ("grow", "cut", "truncate to another size", "write past the end", "mapped write", "readlink"), ATIME, SOMETIMES,
    ),
    *_each("moved_by_content / %: times of #0 ", ("read", "list"), ATIME),
    Expected("moved_by_content / truncate to the same size: times of #0 ", LOCAL_TIME),
    *_each(r"times_set / get reg \(%\) ", _FAR, LOCAL_TIME),
)  # fmt: skip
