"""The real source tree that the demo unpacks: Django's source distribution, or this interpreter's own library."""

from __future__ import annotations

import os
import sys
import sysconfig
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scripts.driver import CommandFailed, run

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "demo"
REQUIREMENTS = ROOT / "requirements-demo.txt"
ARCHIVE_MTIME_S = 1_700_000_000


@dataclass(frozen=True, slots=True)
class Source:
    """A gzipped tar archive with one top directory."""

    title: str
    archive: Path
    package: str
    """The directory of Python code in the top directory, which the demo byte-compiles and renames."""


def fetch() -> Source:
    """The pinned source distribution from the cache or the package registry; without either, the standard library."""
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        archive = _cached() or _download()
    except CommandFailed:
        return Source("the interpreter's standard library", _pack_stdlib(), "lib")
    return Source(archive.name, archive, "django")


def _pin() -> tuple[str, str]:
    """File name and SHA-256, from the requirements file."""
    text = REQUIREMENTS.read_text("utf-8")
    requirement = next(line for line in text.splitlines() if "==" in line).split()[0]
    return requirement.replace("==", "-") + ".tar.gz", text.partition("--hash=sha256:")[2].split()[0]


def _cached() -> Path | None:
    name, sha256 = _pin()
    archive = CACHE / name
    return archive if archive.exists() and run(["sha256sum", archive]).stdout.split()[0] == sha256 else None


def _download() -> Path:
    # No dependencies and no build isolation: the archive is unpacked, never installed.
    options = (
        "--quiet --disable-pip-version-check --no-input --retries 1 --no-deps --no-build-isolation --require-hashes"
    )
    which = ["--no-binary", ":all:", "--requirement", str(REQUIREMENTS), "--dest", str(CACHE)]
    run([sys.executable, "-m", "pip", "download", *options.split(), *which])
    archive = _cached()
    if archive is None:
        raise CommandFailed(f"pip download left no {_pin()[0]}")
    return archive


def _plain_entry(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in entry.name or "site-packages" in entry.name or not (entry.isfile() or entry.isdir()):
        return None
    entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = ARCHIVE_MTIME_S, 0, 0, "", ""
    return entry


def _pack_stdlib() -> Path:
    archive = CACHE / f"stdlib-{sys.version_info.major}.{sys.version_info.minor}.tar.gz"
    if not archive.exists():
        descriptor, unfinished = tempfile.mkstemp(dir=CACHE)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
            tar.add(sysconfig.get_path("stdlib"), "stdlib/lib", filter=_plain_entry)
        os.rename(unfinished, archive)
    return archive
