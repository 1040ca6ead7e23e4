"""Where a mount answers otherwise than the ext4 below it: patterns over the prober's lines, each with its reason.

docs/COMPATIBILITY.md lists the same for people.
"""

from __future__ import annotations

FALLOCATE = "the binding has no handler for fallocate; EOPNOTSUPP makes glibc's posix_fallocate write zeros instead"
GROUP_EXEC = "the kernel's FUSE code takes set-group-id from a written file only if its group may execute it"
LOCAL_TIME = "with the writeback cache the kernel keeps mtime and ctime of regular files itself"
ATIME = "reading from the page cache does not reach the daemon; reading ciphertext for any reason does"

EXPECTED: dict[str, str] = {
    r"rare_calls / fallocate (plain|keep size|punch|collapse|zero|insert) ": FALLOCATE,
    r"rare_calls / FS_IOC_GETFLAGS ": "the binding has no handler for ioctl",
    r"rare_calls / tmpfile ": "the binding has no handler for O_TMPFILE; programs fall back to a name and unlink",
    r"subdirectories_of_themselves / rename with flags [45] ": "RENAME_WHITEOUT is overlayfs's and is not stored",
    r"set_id_bits / descriptor's after (?!open and cut)[a-z_ ]+ of (2767|2666) by ben ": GROUP_EXEC,
    r"set_id_bits / chown of nothing of (2767|2666) by ben ": GROUP_EXEC,
    r"moved_by_names / (unlink one name of|rename) symlink[ a-z]*: times of #[02] ": ATIME,
    r"moved_by_attributes / chown symlink [-:0-9]+: times of #0 ": ATIME,
    r"moved_by_content / (grow|cut|truncate to another size|write past the end|mapped write): times of #0 ": ATIME,
    r"moved_by_content / (read|list|readlink): times of #0 ": ATIME,
    r"moved_by_content / truncate to the same size: times of #0 ": LOCAL_TIME,
    r"times_set / get reg \((-214748364[89]|1503238553[56]|100000000000|-100000000000), ": LOCAL_TIME,
}
