"""stress-ng's filesystem stressors and fio with verification on a mount. `scripts/install.sh torture` installs both."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mount.box import Box

pytestmark = [pytest.mark.mount, pytest.mark.torture]

SECONDS = int(os.environ.get("CRYPTFS_STRESSOR_S", "10"))
"""For each stressor."""

STRESSORS = (
    "access", "chattr", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "dirmany", "dnotify",
    "dup", "eventfd", "fallocate", "fanotify", "fcntl", "fiemap", "file-ioctl", "filename", "flock", "fpunch", "fsize",
    "fstat", "getdent", "handle", "hdd", "inode-flags", "inotify", "io", "iomix", "lease", "link", "locka", "lockf",
    "lockofd", "mknod", "mmap", "mmapfork", "msync", "open", "readahead", "rename", "revio", "seek", "sendfile",
    "splice", "symlink", "sync-file", "tee", "touch", "utime", "xattr",
)  # fmt: skip

EMULATED = {"fsize"}
"""These ask fallocate(2), which FUSE's binding does not have, for RLIMIT_FSIZE, and are answered by an emulation of
their own that knows no limit. (write, truncate and posix_fallocate heed it, here as on ext4.)
"""

FIO = {
    "sequential": "--rw=write --bs=128k --size=64m",
    "random": "--rw=randwrite --bs=4k --size=32m --fsync=32",
    "unaligned": "--rw=randwrite --bsrange=512-70k --bs_unaligned=1 --size=24m",
    "mixed": "--rw=randrw --bs=8k --size=32m --verify_backlog=64",
    "mapped": "--rw=randwrite --bs=4k --size=32m --ioengine=mmap",
    "direct": "--rw=randwrite --bs=4k --size=16m --direct=1",
    "several": "--rw=randwrite --bs=16k --size=16m --numjobs=4",
}


@pytest.fixture(scope="module")
def work(shared: Box) -> Path:
    """A directory to work in; afterwards the mount still answers and nothing unexpected was logged."""
    path = shared.clear / "work"
    path.mkdir(exist_ok=True)
    return path


def _need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"no {program}: scripts/install.sh torture")
    return found


@pytest.mark.parametrize("stressor", STRESSORS)
def test_stress_ng(stressor: str, work: Path) -> None:
    ended = subprocess.run(
        [_need("stress-ng"), f"--{stressor}", "2", "--timeout", str(SECONDS), "--temp-path", work, "--verify"],
        capture_output=True, text=True, errors="replace", timeout=SECONDS + 120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    failed = [line for line in ended.stderr.splitlines() if "fail:" in line and stressor not in EMULATED]
    assert not failed, failed
    assert not any(name.startswith("tmp-stress") for name in os.listdir(work))


@pytest.mark.parametrize("job", FIO)
def test_fio_finds_what_it_wrote(job: str, work: Path) -> None:
    words = [
        _need("fio"), f"--name={job}", f"--directory={work}", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
        "--verify_state_save=0",
        "--ioengine=psync", "--randseed=7", *FIO[job].split(),
    ]  # fmt: skip
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for path in work.glob(f"{job}.*"):
        path.unlink()
