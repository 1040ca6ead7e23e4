"""Which protector is used and which secret is asked for: decided from options and volume, before any is tried."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from cryptfs.cli import passphrase, protectors
from cryptfs.cli.protectors import Choice, Given, named
from cryptfs.cli.recovery import Mistyped
from cryptfs.errors import UsageError, VolumeBusy, WrongSecret

if TYPE_CHECKING:
    from cryptfs.format.volume import Volume


def volume(*rows: tuple[str, str, str]) -> Volume:
    """Protectors of (kind, label, how the id begins)."""
    made = [
        SimpleNamespace(kind=kind, label=label, protector_id=bytes.fromhex(begin.ljust(32, "0")), params={})
        for kind, label, begin in rows
    ]
    return cast("Volume", SimpleNamespace(protectors=tuple(made)))


def given(options: dict[str, Any]) -> Given:
    own = {name: value for name, value in options.items() if name not in ("passfile", "pinfile")}
    pin = passphrase.Sources(options.get("pinfile"), words=passphrase.PIN)
    return Given(passphrase.Sources(options.get("passfile")), pin, **own)


def choose(volume: Volume, options: dict[str, Any] | None = None) -> tuple[str, str]:
    """The kind, and the label of the one protector, or nothing."""
    choice = given(options or {}).choose(volume)
    return choice.kind, choice.protector.label if choice.protector is not None else ""


FILE = Path("file")
ALL = volume(
    ("passphrase", "mine", "aa01"),
    ("passphrase", "yours", "aa02"),
    ("keyfile", "stick", "bb01"),
    ("recovery", "paper", "cc01"),
    ("pkcs11", "card", "dd01"),
    ("pkcs11", "spare", "dd02"),
)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, ("passphrase", "")),
        ({"passfile": FILE}, ("passphrase", "")),
        ({"keyfile": FILE}, ("keyfile", "stick")),
        ({"recovery_key": True}, ("recovery", "paper")),
        ({"recovery_file": FILE}, ("recovery", "paper")),
        ({"protector": "yours"}, ("passphrase", "yours")),
        ({"protector": "yours", "passfile": FILE}, ("passphrase", "yours")),
        ({"protector": "card"}, ("pkcs11", "card")),
        ({"protector": "card", "pinfile": FILE}, ("pkcs11", "card")),
        ({"protector": "DD02"}, ("pkcs11", "spare")),
        ({"protector": "stick"}, ("keyfile", "stick")),
    ],
)
def test_what_is_chosen(options: dict[str, Any], chosen: tuple[str, str]) -> None:
    assert choose(ALL, options) == chosen


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pinfile": FILE}, "several tokens"),
        ({"protector": "nobody"}, "no protector 'nobody'"),
        ({"protector": "aa"}, "no protector 'aa'"),
        ({"protector": "aa0"}, "no protector 'aa0'"),
        ({"protector": "card", "passfile": FILE}, "opened by a PIN, not by a passphrase"),
        ({"protector": "mine", "keyfile": FILE}, "opened by a passphrase, not by a key file"),
        ({"keyfile": FILE, "pinfile": FILE}, "more than one secret: --pinfile and --keyfile"),
        ({"recovery_file": FILE, "recovery_key": True}, "--recovery-key and --recovery-file"),
    ],
)
def test_what_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        choose(ALL, options)


def test_a_volume_without_passphrase_asks_for_what_it_has() -> None:
    card = ("pkcs11", "card", "dd01")
    assert choose(volume(card, ("recovery", "paper", "cc01"))) == ("pkcs11", "card")
    assert choose(volume(("keyfile", "stick", "bb01"), ("recovery", "paper", "cc01"))) == ("recovery", "paper")
    with pytest.raises(UsageError, match="opened by a key file, and none was given") as caught:
        choose(volume(("keyfile", "stick", "bb01")))
    assert "--keyfile" in caught.value.__notes__[0]
    with pytest.raises(UsageError, match="has no passphrase among its protectors"):
        choose(volume(card), {"passfile": FILE})
    with pytest.raises(UsageError, match="several tokens"):
        choose(volume(card, ("pkcs11", "spare", "dd02")))
    with pytest.raises(UsageError, match="does not know"):
        choose(volume(("quantum", "new", "ee01")), {"protector": "new"})


def test_a_label_comes_before_an_id_and_neither_may_be_ambiguous() -> None:
    both = volume(("passphrase", "beef", "aa01"), ("passphrase", "x", "beef01"), ("passphrase", "y", "beef02"))
    assert named(both, "beef").label == "beef"
    assert named(both, "beef01").label == "x"
    same = volume(("passphrase", "x", "beef01"), ("passphrase", "y", "beef02"))
    with pytest.raises(UsageError, match="could be 2 protectors"):
        named(same, "beef")
    twins = volume(("passphrase", "x", "aa01"), ("keyfile", "x", "aa02"))
    with pytest.raises(UsageError, match="could be 2 protectors") as caught:
        named(twins, "x")
    assert "aa010000, aa020000" in caught.value.__notes__[0]


def test_only_a_wrong_secret_that_was_typed_may_be_typed_again_and_no_pin() -> None:
    def choice(kind: str, source: str = "") -> Choice:
        return Choice(kind, None, given({source: FILE} if source else {}))

    for asked in (choice(protectors.PASSPHRASE), choice(protectors.RECOVERY)):
        for failure in (WrongSecret(), Mistyped()):
            assert asked.may_ask_again(failure, 1)
            assert not asked.may_ask_again(failure, passphrase.ATTEMPTS)
        assert not asked.may_ask_again(VolumeBusy(), 1)
    for never in (
        choice(protectors.PKCS11),
        choice(protectors.KEYFILE, "keyfile"),
        choice(protectors.PASSPHRASE, "passfile"),
        choice(protectors.RECOVERY, "recovery_file"),
    ):
        assert not never.may_ask_again(WrongSecret(), 1)
