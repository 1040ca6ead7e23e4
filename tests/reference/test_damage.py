"""The reference never takes damage for content: whatever is changed, an entry is as it was, or it is named."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from scripts import reference_decrypt
from tests.mount.box import PASSPHRASE
from tests.reference.trees import ROOT, Entry, describe

VOLUMES = ROOT / "tests/volumes"
MUTATIONS_EACH = 8


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    top = tmp_path_factory.mktemp("golden")
    subprocess.run(["tar", "-xpzf", VOLUMES / "v1.tar.gz", "--no-same-owner", "-C", top], check=True)
    (top / "pass").write_text(PASSPHRASE + "\n")
    yield top
    shutil.rmtree(top)


def files_of(vault: Path) -> list[Path]:
    return sorted(path for path in vault.rglob("*") if path.is_file() and not path.is_symlink())


def flip(vault: Path, rng: random.Random) -> None:
    path = rng.choice([path for path in files_of(vault) if path.stat().st_size])
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def truncate(vault: Path, rng: random.Random) -> None:
    path = rng.choice(files_of(vault))
    os.truncate(path, rng.choice([0, path.stat().st_size * rng.random()]).__int__())


def zero(vault: Path, rng: random.Random) -> None:
    path = rng.choice([path for path in files_of(vault) if path.stat().st_size > 512])
    with path.open("r+b") as stream:
        stream.seek(rng.randrange(path.stat().st_size // 512) * 512)
        stream.write(bytes(512))


def append(vault: Path, rng: random.Random) -> None:
    with rng.choice(files_of(vault)).open("ab") as stream:
        stream.write(rng.randbytes(rng.choice([1, 160, 5000])))


def remove(vault: Path, rng: random.Random) -> None:
    rng.choice(files_of(vault)).unlink()


def exchange(vault: Path, rng: random.Random) -> None:
    kind = rng.choice([vault / "tree", vault / "sidecars"])
    one, other = rng.sample(files_of(kind), 2)
    os.rename(one, vault / "tmp" / "x")
    os.rename(other, one)
    os.rename(vault / "tmp" / "x", other)


def move(vault: Path, rng: random.Random) -> None:
    path = rng.choice(files_of(vault / "tree"))
    to = rng.choice([path.parent for path in files_of(vault / "tree")])
    os.rename(path, to / path.name)


@pytest.mark.parametrize("mutate", [flip, truncate, zero, append, remove, exchange, move])
def test_damage_is_named_and_nothing_else_changes(
    mutate: Callable[[Path, random.Random], None],
    pristine: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected: dict[str, Entry] = json.loads((VOLUMES / "v1.json").read_text())
    noticed = 0
    refusals: list[str] = []
    for seed in range(MUTATIONS_EACH):
        vault, plain = tmp_path / f"vault{seed}", tmp_path / f"plain{seed}"
        shutil.copytree(pristine / "vault", vault, symlinks=True, copy_function=shutil.copy2, ignore=_fifos)
        _relink(pristine / "vault", vault)
        mutate(vault, random.Random(seed))
        try:
            reference_decrypt.main([str(vault), str(plain), "--passfile", str(pristine / "pass")])
        except SystemExit as refused:  # `volume`, `state` or the root's own log
            refusals.append(str(refused))
            continue
        said = capfd.readouterr().err
        noticed += bool(said)
        got = describe(plain)
        assert set(got) <= set(expected)
        for name, entry in expected.items():
            assert _same(got.get(name), entry) or _is_named(name, said), (seed, name, said)
    assert all(refusal.startswith("error: ") for refusal in refusals)
    assert noticed + len(refusals) >= 2


def _fifos(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(directory, name).is_fifo()]


def _relink(source: Path, copy: Path) -> None:
    """Hard links and fifos, which `copytree` does not copy."""
    seen: dict[int, Path] = {}
    for path in sorted(source.rglob("*")):
        info, here = path.lstat(), copy / path.relative_to(source)
        if path.is_fifo():
            os.mkfifo(here, 0o640)
        elif path.is_file() and not path.is_symlink() and info.st_nlink > 1:
            if info.st_ino in seen:
                here.unlink()
                os.link(seen[info.st_ino], here)
            seen.setdefault(info.st_ino, here)


def _same(got: Entry | None, expected: Entry) -> bool:
    """Equal but for what a change of the file's bytes from outside changes by itself."""
    volatile = {"mtime_ns", "links", "same_as"}
    return got is not None and all(got.get(key) == value for key, value in expected.items() if key not in volatile)


def _is_named(name: str, said: str) -> bool:
    """The entry, a directory above it, or a name that nobody can open any more."""
    path = b"/" + unquote_to_bytes(name)
    parts = path.split(b"/")
    above = [b"/".join(parts[: n + 1]).decode(errors="backslashreplace") for n in range(1, len(parts))]
    return any(f"damaged: {each}: " in said for each in above) or "/<" in said
