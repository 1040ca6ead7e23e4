"""New versions of a `volume` file: who opens them, who no longer does, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest

from cryptfs.agent import editing
from cryptfs.agent.unlocking import Key, NewProtector, NewVolume, Unlocked, create_volume, unlock_volume
from cryptfs.crypto.secret import Secret
from cryptfs.crypto.wrap import ZERO_ID, unwrap_keys, wrapping_key
from cryptfs.errors import CryptfsError, ShredSecretMissing, UnsupportedFormat, UsageError, VolumeDamaged, WrongSecret
from cryptfs.format.policy import Policy
from cryptfs.format.volume import parse_volume
from cryptfs.testing.roots import FakeProvider
from cryptfs.types import Purpose

PROVIDERS = {"fake": FakeProvider()}
SHRED = bytes(range(32))


def new(label: str) -> NewProtector:
    return NewProtector("fake", {"cost": "low"}, label, 7)


def made(shred: bytes | None = None) -> Unlocked:
    wish = NewVolume(4096, new("first"), 7, shred_kind="keyfile" if shred else "")
    return create_volume(wish, Secret.of(b"one"), PROVIDERS, os.urandom, None if shred is None else Secret.of(shred))


def opened(now: Unlocked, secret: bytes, shred: bytes | None = None) -> Unlocked:
    """From the bytes alone, as after a restart."""
    return unlock_volume(now.data, Key(Secret.of(secret)), PROVIDERS, None if shred is None else Secret.of(shred))


def ids(now: Unlocked) -> Sequence[bytes]:
    return [protector.protector_id for protector in now.volume.protectors]


def added(now: Unlocked, label: str, secret: bytes) -> Unlocked:
    return editing.with_protector(now, new(label), Secret.of(secret), PROVIDERS, os.urandom, None)


def carried(now: Unlocked, *secrets: bytes) -> list[Key]:
    return [Key(Secret.of(secret), protector_id=i) for secret, i in zip(secrets, ids(now), strict=False)]


def rotated(now: Unlocked, *secrets: bytes) -> Unlocked:
    return editing.with_new_kek(now, carried(now, *secrets), PROVIDERS, os.urandom, None)


def volume_key(now: Unlocked) -> bytes | None:
    wrap, volume_id = now.volume.volume_key, now.volume.volume_id
    kek = now.keks[wrap.kek_version].view()
    return unwrap_keys(wrapping_key(kek, Purpose.VOLUME, volume_id, ZERO_ID, wrap.kek_version), wrap.wrapped, 40)


def test_a_protector_more_opens_the_same_keys() -> None:
    first = made()
    both = added(first, "second", b"two")
    assert both.volume.serial == first.volume.serial + 1
    for secret in (b"one", b"two"):
        assert opened(both, secret).keks[1].equals(first.keks[1])
    with pytest.raises(WrongSecret):
        opened(first, b"two")


def test_a_protector_less_no_longer_opens() -> None:
    both = added(made(), "second", b"two")
    left = editing.without_protector(both, ids(both)[0])
    assert opened(left, b"two").volume == left.volume
    with pytest.raises(WrongSecret):
        opened(left, b"one")


def test_a_changed_secret_replaces_the_old_one() -> None:
    both = added(made(), "second", b"two")
    changed = editing.with_changed_protector(both, ids(both)[1], new("second"), Secret.of(b"three"), PROVIDERS, None)
    assert ids(changed) == ids(both)
    assert opened(changed, b"three").keks[1].equals(both.keks[1])
    with pytest.raises(WrongSecret):
        opened(changed, b"two")


def test_a_policy_is_part_of_the_file() -> None:
    changed = editing.with_policy(made(), Policy(max_age_s=5, idle_s=60))
    assert opened(changed, b"one").volume.policy == Policy(max_age_s=5, idle_s=60)


def test_a_new_kek_beside_the_old_one_and_then_alone() -> None:
    first = made()
    two = rotated(first, b"one")
    assert two.volume.kek_version == two.volume.volume_key.kek_version == 2
    again = opened(two, b"one")
    assert sorted(again.keks) == [1, 2]
    assert again.keks[1].equals(first.keks[1])
    assert not again.keks[2].equals(first.keks[1])
    assert volume_key(again) == volume_key(first)
    alone = editing.without_old_keks(again)
    assert sorted(opened(alone, b"one").keks) == [2]
    assert volume_key(opened(alone, b"one")) == volume_key(first)
    # What the file of yesterday opens is of no use in the file of today.
    assert not any(kek.equals(opened(alone, b"one").keks[2]) for kek in opened(first, b"one").keks.values())


def test_who_is_not_carried_over_is_out() -> None:
    both = added(made(), "second", b"two")
    left = rotated(both, b"one")
    assert [protector.label for protector in left.volume.protectors] == ["first"]
    with pytest.raises(WrongSecret):
        opened(left, b"two")


def test_all_carried_over_stay_in_their_order() -> None:
    both = added(made(), "second", b"two")
    keys = [Key(Secret.of(s), protector_id=i) for s, i in zip((b"two", b"one"), reversed(ids(both)), strict=True)]
    turned = editing.with_new_kek(both, keys, PROVIDERS, os.urandom, None)
    assert ids(turned) == ids(both)
    for secret in (b"one", b"two"):
        assert sorted(opened(turned, secret).keks) == [1, 2]


def test_a_shred_secret_is_needed_besides_the_protector() -> None:
    first = made(SHRED)
    shred = Secret.of(SHRED)
    both = editing.with_protector(first, new("second"), Secret.of(b"two"), PROVIDERS, os.urandom, shred)
    turned = editing.with_new_kek(both, carried(both, b"one", b"two"), PROVIDERS, os.urandom, shred)
    for file in (first, both, turned):
        assert opened(file, b"one", SHRED).keks[1].equals(first.keks[1])
        for other in (None, bytes(32), SHRED[:-1] + b"x"):
            with pytest.raises(ShredSecretMissing):
                opened(file, b"one", other)
    with pytest.raises(WrongSecret):
        opened(both, b"neither", SHRED)


@pytest.mark.parametrize("other", [None, bytes(32), SHRED[:-1] + b"x"])
def test_nothing_is_sealed_with_another_shred_secret_or_without_one(other: bytes | None) -> None:
    first = made(SHRED)
    shred = None if other is None else Secret.of(other)
    edits: list[Callable[[], object]] = [
        lambda: editing.with_protector(first, new("second"), Secret.of(b"two"), PROVIDERS, os.urandom, shred),
        lambda: editing.with_changed_protector(first, ids(first)[0], new("first"), Secret.of(b"two"), PROVIDERS, shred),
        lambda: editing.with_new_kek(first, carried(first, b"one"), PROVIDERS, os.urandom, shred),
    ]
    for edit in edits:
        with pytest.raises(ShredSecretMissing):
            edit()


def test_an_ephemeral_volume_is_opened_by_nothing() -> None:
    nobodys = create_volume(NewVolume(4096, None, 7), Secret.of(b""), PROVIDERS, os.urandom)
    assert parse_volume(nobodys.data).ephemeral
    with pytest.raises(UnsupportedFormat, match="ephemeral"):
        opened(nobodys, b"one")
    with pytest.raises(UsageError, match="ephemeral"):
        added(nobodys, "second", b"two")
    with pytest.raises(UsageError, match="ephemeral"):
        rotated(nobodys)


REFUSED: dict[str, tuple[type[CryptfsError], Callable[[Unlocked], object]]] = {
    "the last protector": (UsageError, lambda now: editing.without_protector(now, ids(now)[0])),
    "a protector that is not there": (UsageError, lambda now: editing.without_protector(now, bytes(16))),
    "a label that is taken": (UsageError, lambda now: added(now, "first", b"two")),
    "no label": (UsageError, lambda now: added(now, "", b"two")),
    "a label too long for the file": (UsageError, lambda now: added(now, "x" * 300, b"two")),
    "nothing carried over": (UsageError, rotated),
    "carried over with a wrong secret": (WrongSecret, lambda now: rotated(now, b"wrong")),
    "another kind": (
        UsageError,
        lambda now: editing.with_changed_protector(
            now, ids(now)[0], NewProtector("abacus", {}, "first", 7), Secret.of(b"x"), PROVIDERS, None
        ),
    ),
    "an unknown kind": (
        UnsupportedFormat,
        lambda now: editing.with_protector(
            now, NewProtector("abacus", {}, "second", 7), Secret.of(b"x"), PROVIDERS, os.urandom, None
        ),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    error, edit = REFUSED[what]
    now = made()
    with pytest.raises(error):
        edit(now)
    assert opened(now, b"one").volume == now.volume


def test_too_many_protectors_or_versions_are_refused() -> None:
    now = made()
    for number in range(31):
        now = added(now, f"number {number}", b"x")
    with pytest.raises(UsageError, match="32"):
        added(now, "one more", b"x")
    turned = made()
    for _ in range(63):
        turned = rotated(turned, b"one")
    with pytest.raises(UsageError, match="64"):
        rotated(turned, b"one")


def test_protectors_that_hold_different_keys_are_not_carried_over() -> None:
    first, stranger = made(), made()
    mixed = Unlocked(first.volume, first.data, stranger.keks)
    with pytest.raises(VolumeDamaged):
        rotated(mixed, b"one")
