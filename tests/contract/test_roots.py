"""What every kind of root key must do, whatever stands behind it: one suite over all providers, the fake included.

Nothing but the fake is a stand-in: the PKCS#11 token is SoftHSM's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from cryptfs.errors import CryptfsError, UnsupportedFormat, UsageError, VolumeDamaged, WrongSecret
from cryptfs.format.recovery_key import KEY_BYTES
from cryptfs.format.volume import LABEL_MAX_CHARS, WRAPPED_MAX_BYTES
from cryptfs.ports import RootProvider
from cryptfs.roots.keyfile import KeyfileProvider
from cryptfs.roots.passphrase import PassphraseProvider
from cryptfs.roots.pkcs11 import Pkcs11Provider
from cryptfs.roots.recovery import RecoveryProvider
from cryptfs.testing.roots import FakeProvider
from tests.softhsm import MODULE, MODULE_PATH, PIN

CONTEXT = b"cryptfs/1/protector\0" + bytes(range(32))
SEED = bytes(range(32))
Params = Mapping[str, int | str | bytes]


@dataclass(frozen=True)
class Kind:
    """A kind under test, and what it is asked with."""

    provider: RootProvider
    wish: Params
    secret: bytes
    wrong: bytes
    not_mine: type[CryptfsError] = WrongSecret
    """Raised for a wrap that this root did not make. A token tells that from a wrong PIN."""

    def new_params(self) -> Params:
        return self.provider.new_params(self.wish)


def _passphrase(_: pytest.FixtureRequest) -> Kind:
    return Kind(PassphraseProvider(), {"cost": "low"}, b"secret", b"Secret")


def _keyfile(_: pytest.FixtureRequest) -> Kind:
    return Kind(KeyfileProvider(), {}, bytes(range(64)), bytes(range(1, 65)))


def _recovery(_: pytest.FixtureRequest) -> Kind:
    return Kind(RecoveryProvider(), {}, bytes(range(KEY_BYTES)), bytes(range(1, KEY_BYTES + 1)))


def _pkcs11(request: pytest.FixtureRequest) -> Kind:
    request.getfixturevalue("softhsm")
    wish = {"module": MODULE, "token": "contract"}
    return Kind(Pkcs11Provider({MODULE: MODULE_PATH}), wish, PIN.encode(), b"000000", not_mine=VolumeDamaged)


def _fake(_: pytest.FixtureRequest) -> Kind:
    return Kind(FakeProvider(), {"cost": "low"}, b"secret", b"Secret")


KINDS: dict[str, Callable[[pytest.FixtureRequest], Kind]] = {
    "passphrase": _passphrase,
    "keyfile": _keyfile,
    "recovery": _recovery,
    "pkcs11": _pkcs11,
    "fake": _fake,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param](request)


def wrapped_by(kind: Kind, params: Params, key: bytes = SEED) -> bytes:
    root = kind.provider.open(params, kind.secret)
    try:
        return root.wrap(key, CONTEXT)
    finally:
        root.close()


def unwrapped_by(kind: Kind, params: Params, wrapped: bytes, context: bytes = CONTEXT) -> bytearray:
    root = kind.provider.open(dict(params), bytearray(kind.secret))
    try:
        return root.unwrap(wrapped, context)
    finally:
        root.close()


def test_what_was_wrapped_unwraps_with_the_same_params_and_secret(kind: Kind) -> None:
    params = kind.new_params()
    wrapped = wrapped_by(kind, params)
    assert SEED not in wrapped
    assert 0 < len(wrapped) <= WRAPPED_MAX_BYTES
    again = unwrapped_by(kind, params, wrapped)
    assert again == SEED
    assert isinstance(again, bytearray), "the caller wipes it, so it must be mutable"


def test_a_wrong_secret_is_told_so(kind: Kind) -> None:
    params = kind.new_params()
    wrapped = wrapped_by(kind, params)
    with pytest.raises(WrongSecret) as caught:
        kind.provider.open(params, kind.wrong).unwrap(wrapped, CONTEXT)
    assert kind.wrong.decode("latin-1") not in str(caught.value)


@pytest.mark.parametrize("what", ["context", "bit", "short", "shorter", "long", "empty"])
def test_anything_else_is_not_mine(kind: Kind, what: str) -> None:
    params = kind.new_params()
    wrapped = wrapped_by(kind, params)
    context = CONTEXT[:-1] + b"\xff" if what == "context" else CONTEXT
    tried = {
        "bit": bytes([wrapped[0] ^ 1]) + wrapped[1:],
        "short": wrapped[:-1],
        "shorter": wrapped[:20],
        "long": wrapped + b"\0",
        "empty": b"",
    }.get(what, wrapped)
    with pytest.raises(kind.not_mine):
        unwrapped_by(kind, params, tried, context)


def test_one_bit_anywhere_is_noticed(kind: Kind) -> None:
    root = kind.provider.open(kind.new_params(), kind.secret)
    wrapped = root.wrap(SEED, CONTEXT)
    for position in range(len(wrapped)):
        changed = bytearray(wrapped)
        changed[position] ^= 0x80
        with pytest.raises(kind.not_mine):
            root.unwrap(bytes(changed), CONTEXT)
    assert root.unwrap(wrapped, CONTEXT) == SEED
    root.close()


def test_params_are_what_a_volume_file_can_hold_and_quote_no_secret(kind: Kind) -> None:
    params = kind.new_params()
    wrapped_by(kind, params)
    assert all(type(key) is str and type(value) in (int, str, bytes) for key, value in params.items())
    assert 0 < len(kind.provider.kind) <= LABEL_MAX_CHARS
    line = kind.provider.describe(params)
    assert line
    assert "\n" not in line
    assert kind.secret.decode("latin-1") not in line
    assert kind.secret not in [value for value in params.values() if isinstance(value, bytes)]


def test_two_protectors_of_one_secret_do_not_share_wraps(kind: Kind) -> None:
    root = kind.provider.open(kind.new_params(), kind.secret)
    assert root.wrap(SEED, CONTEXT) != root.wrap(SEED, CONTEXT + b"2")
    root.close()
    one, two = kind.new_params(), kind.new_params()
    wrapped = wrapped_by(kind, one)
    wrapped_by(kind, two)
    if kind.provider.kind != "fake":
        with pytest.raises(kind.not_mine):
            unwrapped_by(kind, two, wrapped)


def test_an_unknown_wish_is_refused(kind: Kind) -> None:
    with pytest.raises(UsageError):
        kind.provider.new_params({**kind.wish, "colour": "blue"})


def test_params_that_are_not_exactly_its_own_are_refused(kind: Kind) -> None:
    params = kind.new_params()
    tried: list[Params] = [{**params, "extra": 1}, {}]
    for name in params:
        tried.append({key: value for key, value in params.items() if key != name})
        tried.extend({**params, name: value} for value in (b"", "", -1, "x" * 4096) if kind.provider.kind != "fake")
    for each in tried:
        with pytest.raises((VolumeDamaged, UnsupportedFormat)):
            kind.provider.open(each, kind.secret)


def test_a_closed_root_wraps_nothing(kind: Kind) -> None:
    root = kind.provider.open(kind.new_params(), kind.secret)
    wrapped = root.wrap(SEED, CONTEXT)
    root.close()
    root.close()
    with pytest.raises(ValueError, match=r"wiped|closed"):
        root.wrap(SEED, CONTEXT)
    with pytest.raises(ValueError, match=r"wiped|closed"):
        root.unwrap(wrapped, CONTEXT)


@pytest.mark.parametrize("length", [0, 31, (64 << 10) + 1])
def test_a_key_file_of_another_length_is_no_key_file(length: int) -> None:
    provider = KeyfileProvider()
    with pytest.raises(WrongSecret, match="32 to 65536 bytes"):
        provider.open(provider.new_params({}), os.urandom(length))


def test_key_file_and_recovery_key_lead_to_different_root_keys() -> None:
    """The same bytes and the same salt, but not the same purpose."""
    secret = bytes(range(KEY_BYTES))
    recovery = RecoveryProvider(bytes)
    wrapped = recovery.open(recovery.new_params({}), secret).wrap(SEED, CONTEXT)
    assert wrapped == bytes.fromhex(RECOVERY_ANSWER)
    keyfile = KeyfileProvider(bytes)
    wrapped = keyfile.open(keyfile.new_params({}), bytes(32)).wrap(SEED, CONTEXT)
    assert wrapped == bytes.fromhex(KEYFILE_ANSWER)


RECOVERY_ANSWER = (
    "000000000000000000000000aee429b7f1aa5a4eaceb32293418bcb6b2aea24ffb528a2c22a081f659525159cf94d64a9132"
    "8eaf3e2b42af82f8325f"
)
KEYFILE_ANSWER = (
    "0000000000000000000000008fdc65cc3dc42cb843418e4dc7525352b2e60ee88a59fddcef75c0a936e190d23d83db31aee7"
    "0f1de4cd51fb29514da8"
)
