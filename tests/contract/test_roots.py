"""What every kind of root key must do, whatever stands behind it: one suite over all providers, the fake included."""

from __future__ import annotations

import os

import pytest

from cryptfs.errors import UsageError, VolumeDamaged, WrongSecret
from cryptfs.format.volume import LABEL_MAX_CHARS, WRAPPED_MAX_BYTES
from cryptfs.ports import RootProvider
from cryptfs.roots.passphrase import PassphraseProvider
from cryptfs.testing.roots import FakeProvider

CONTEXT = b"cryptfs/0/protector\0" + bytes(range(36))
KEK = bytes(range(32))
PROVIDERS = {"passphrase": PassphraseProvider, "fake": FakeProvider}


@pytest.fixture(params=sorted(PROVIDERS))
def provider(request: pytest.FixtureRequest) -> RootProvider:
    made: RootProvider = PROVIDERS[request.param]()
    return made


def test_what_was_wrapped_unwraps_with_the_same_params_and_secret(provider: RootProvider) -> None:
    params = provider.new_params({"cost": "low"})
    wrapped = provider.open(params, b"secret").wrap(KEK, CONTEXT)
    assert KEK not in wrapped
    assert 0 < len(wrapped) <= WRAPPED_MAX_BYTES
    again = provider.open(dict(params), bytearray(b"secret")).unwrap(wrapped, CONTEXT)
    assert again == KEK
    assert isinstance(again, bytearray), "the caller wipes it, so it must be mutable"


@pytest.mark.parametrize("what", ["secret", "context", "bit", "short", "empty"])
def test_anything_else_is_not_mine(provider: RootProvider, what: str) -> None:
    params = provider.new_params({"cost": "low"})
    wrapped = provider.open(params, b"secret").wrap(KEK, CONTEXT)
    root = provider.open(params, b"Secret" if what == "secret" else b"secret")
    context = CONTEXT[:-1] + b"\xff" if what == "context" else CONTEXT
    tried = {
        "bit": bytes([wrapped[0] ^ 1]) + wrapped[1:],
        "short": wrapped[:-1],
        "empty": b"",
    }.get(what, wrapped)
    with pytest.raises(WrongSecret):
        root.unwrap(tried, context)


def test_one_bit_anywhere_is_noticed(provider: RootProvider) -> None:
    root = provider.open(provider.new_params({"cost": "low"}), b"secret")
    wrapped = root.wrap(KEK, CONTEXT)
    for position in range(len(wrapped)):
        changed = bytearray(wrapped)
        changed[position] ^= 0x80
        with pytest.raises(WrongSecret):
            root.unwrap(bytes(changed), CONTEXT)


def test_params_are_what_a_volume_file_can_hold(provider: RootProvider) -> None:
    params = provider.new_params({"cost": "low"})
    assert all(type(key) is str and type(value) in (int, str, bytes) for key, value in params.items())
    assert 0 < len(provider.kind) <= LABEL_MAX_CHARS
    line = provider.describe(params)
    assert line
    assert "\n" not in line
    assert "secret" not in line


def test_two_protectors_of_one_secret_do_not_share_wraps(provider: RootProvider) -> None:
    params = provider.new_params({"cost": "low"})
    root = provider.open(params, b"secret")
    assert root.wrap(KEK, CONTEXT) != root.wrap(KEK, CONTEXT + b"2")


def test_an_unknown_cost_is_refused(provider: RootProvider) -> None:
    with pytest.raises(UsageError):
        provider.new_params({"cost": "free"})


def test_params_with_a_field_too_many_are_refused(provider: RootProvider) -> None:
    with pytest.raises(VolumeDamaged):
        provider.open(provider.new_params({"cost": "low"}) | {"extra": 1}, b"secret")


def test_a_closed_root_wraps_nothing(provider: RootProvider) -> None:
    root = provider.open(provider.new_params({"cost": "low"}), os.urandom(8))
    root.close()
    root.close()
    with pytest.raises(ValueError, match="wiped"):
        root.wrap(KEK, CONTEXT)
