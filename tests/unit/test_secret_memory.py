"""Secrets in memory that the kernel does not map, where there is such memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cryptfs.crypto.secret import Secret
from cryptfs.crypto.secret_memory import POOL_BYTES, SLOT_BYTES, SecretMemory


@pytest.fixture
def memory() -> SecretMemory:
    made = SecretMemory()
    if made.why_not is not None:
        pytest.skip(made.why_not)
    return made


def test_a_secret_moves_and_its_old_place_is_wiped(memory: SecretMemory) -> None:
    old = Secret.of(b"s" * 32)
    new = memory.moved(old)
    assert old.wiped
    assert bytes(new.view()) == b"s" * 32
    assert len(new) == 32
    view = new.view()
    new.wipe()
    assert bytes(view) == bytes(32)
    with pytest.raises(ValueError, match="wiped"):
        new.view()


def test_it_cannot_be_read_from_outside(memory: SecretMemory) -> None:
    held = memory.moved(Secret.of(os.urandom(32)))
    maps = Path("/proc/self/maps").read_text()
    starts = [int(line.split("-")[0], 16) for line in maps.splitlines() if "secretmem" in line]
    assert starts
    with open("/proc/self/mem", "rb", buffering=0) as mem:
        for start in starts:
            mem.seek(start)
            with pytest.raises(OSError, match="Input/output"):
                mem.read(32)
    held.wipe()


def test_slots_are_used_again_and_when_there_are_none_secrets_stay(memory: SecretMemory) -> None:
    held = [memory.moved(Secret.of(bytes([i % 256]) * 32)) for i in range(POOL_BYTES // SLOT_BYTES)]
    extra = Secret.of(b"x" * 32)
    assert memory.moved(extra) is extra
    assert all(bytes(each.view()) == bytes([i % 256]) * 32 for i, each in enumerate(held))
    held[3].wipe()
    held[3].wipe()
    moved = memory.moved(extra)
    assert moved is not extra
    another = Secret.of(b"y" * 32)
    assert memory.moved(another) is another, "a slot given back twice would be two secrets' place"
    large = Secret.of(bytes(SLOT_BYTES + 1))
    assert memory.moved(large) is large


def test_where_there_is_none_secrets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryptfs.crypto.secret_memory._MEMFD_SECRET", 9999)
    memory = SecretMemory()
    assert memory.why_not is not None
    secret = Secret.of(b"s" * 32)
    assert memory.moved(secret) is secret
    assert bytes(secret.view()) == b"s" * 32
