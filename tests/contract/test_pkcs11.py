"""PKCS#11 beyond what all kinds share: logins, what a token refuses and what it says when it is gone. On SoftHSM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pkcs11
import pytest

from cryptfs.errors import BackendUnavailable, Denied, UsageError, VolumeDamaged, WrongSecret
from cryptfs.roots.pkcs11 import Pkcs11Provider
from tests.softhsm import MODULE, MODULE_PATH, PIN, SoftHsm

CONTEXT = b"what it is for"
SEED = bytes(range(32))
PIN_BYTES = PIN.encode()
WISH = {"module": MODULE, "token": "contract"}
Params = Mapping[str, int | str | bytes]

DESTROY = """
import pkcs11, sys
module, token, pin, key_id = sys.argv[1:]
session = pkcs11.lib(module).get_token(token_label=token).open(rw=True, user_pin=pin)
session.get_key(object_class=pkcs11.ObjectClass.SECRET_KEY, id=bytes.fromhex(key_id)).destroy()
session.close()
"""


@pytest.fixture
def provider(softhsm: SoftHsm) -> Pkcs11Provider:
    return Pkcs11Provider({MODULE: MODULE_PATH})


def destroy(token: str, key_id: object) -> None:
    """By another process, as an administrator would."""
    assert isinstance(key_id, bytes)
    subprocess.run([sys.executable, "-c", DESTROY, MODULE_PATH, token, PIN, key_id.hex()], check=True, timeout=60)


@contextmanager
def own_session() -> Iterator[pkcs11.Session]:
    """The token as its owner uses it, in this process while no root is open."""
    library = pkcs11.lib(MODULE_PATH)
    session = library.get_token(token_label="contract").open(rw=True, user_pin=PIN)
    try:
        yield session
    finally:
        session.close()
        library.finalize()


def make_key(session: pkcs11.Session, bits: int = 256, **attributes: bool) -> bytes:
    key_id = b"made elsewhere"
    template = {pkcs11.Attribute[name]: value for name, value in attributes.items()}
    uses = pkcs11.MechanismFlag.ENCRYPT | pkcs11.MechanismFlag.DECRYPT
    session.generate_key(pkcs11.KeyType.AES, bits, id=key_id, store=True, capabilities=uses, template=template)
    return key_id


def test_the_key_cannot_be_read_out(provider: Pkcs11Provider) -> None:
    params = provider.new_params(WISH)
    provider.open(params, PIN_BYTES).close()
    with own_session() as session:
        (key,) = session.get_objects({pkcs11.Attribute.ID: params["key_id"]})
        for attribute in ("SENSITIVE", "ALWAYS_SENSITIVE", "NEVER_EXTRACTABLE", "PRIVATE", "LOCAL"):
            assert key[pkcs11.Attribute[attribute]] is True
        with pytest.raises(pkcs11.AttributeSensitive):
            key[pkcs11.Attribute.VALUE]


def test_only_the_first_open_makes_the_key(provider: Pkcs11Provider) -> None:
    params = provider.new_params(WISH)
    for _ in range(3):
        provider.open(params, PIN_BYTES).close()
    with own_session() as session:
        assert len(list(session.get_objects({pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY}))) == 1


def test_two_volumes_share_a_login_but_both_must_know_the_pin(provider: Pkcs11Provider) -> None:
    one, two = provider.new_params(WISH), provider.new_params(WISH)
    first = provider.open(one, PIN_BYTES)
    with pytest.raises(WrongSecret, match="for another volume"):
        provider.open(two, b"000000")
    second = provider.open(two, PIN_BYTES)
    wrapped = second.wrap(SEED, CONTEXT)
    first.close()
    assert second.unwrap(wrapped, CONTEXT) == SEED
    second.close()
    with pytest.raises(WrongSecret, match="wrong PIN"):
        provider.open(two, b"000000")


def test_wrong_pins_leave_no_session_and_the_token_says_that_it_counts(provider: Pkcs11Provider) -> None:
    params = provider.new_params(WISH)
    for wrong in (b"000000", b"", b"9" * 300):
        with pytest.raises(WrongSecret, match="the token counts them"):
            provider.open(params, wrong)
    with pytest.raises(WrongSecret, match="the token was not asked"):
        provider.open(params, b"\xff\xfe")
    provider.open(params, PIN_BYTES).close()
    with own_session():
        assert pkcs11.lib(MODULE_PATH).get_token(token_label="contract").flags & pkcs11.TokenFlag.USER_PIN_INITIALIZED


def test_a_key_destroyed_elsewhere_is_refused_at_once(provider: Pkcs11Provider) -> None:
    params = provider.new_params(WISH)
    root = provider.open(params, PIN_BYTES)
    wrapped = root.wrap(SEED, CONTEXT)
    destroy("contract", params["key_id"])
    for use in (lambda: root.unwrap(wrapped, CONTEXT), lambda: root.wrap(SEED, CONTEXT)):
        with pytest.raises(Denied, match="not in the token any more"):
            use()
    root.close()
    with pytest.raises(Denied, match="not in the token any more"):
        provider.open(params, PIN_BYTES)


def test_another_key_under_the_same_id_is_damage(provider: Pkcs11Provider) -> None:
    params = provider.new_params(WISH)
    root = provider.open(params, PIN_BYTES)
    wrapped = root.wrap(SEED, CONTEXT)
    root.close()
    destroy("contract", params["key_id"])
    with own_session() as session:
        uses = pkcs11.MechanismFlag.ENCRYPT | pkcs11.MechanismFlag.DECRYPT
        key_id = params["key_id"]
        assert isinstance(key_id, bytes)
        session.generate_key(pkcs11.KeyType.AES, 256, id=key_id, store=True, capabilities=uses)
    root = provider.open(params, PIN_BYTES)
    with pytest.raises(VolumeDamaged, match="another key"):
        root.unwrap(wrapped, CONTEXT)
    root.close()


def test_a_deleted_token_is_refused_and_then_not_there_and_hides_no_other(
    softhsm: SoftHsm, provider: Pkcs11Provider
) -> None:
    softhsm.make_token("other")
    other = provider.new_params({"module": MODULE, "token": "other"})
    params = provider.new_params(WISH)
    root = provider.open(params, PIN_BYTES)
    wrapped = root.wrap(SEED, CONTEXT)
    softhsm.delete_token("contract")
    with pytest.raises((Denied, BackendUnavailable)):
        root.unwrap(wrapped, CONTEXT)
    provider.open(other, PIN_BYTES).close()
    root.close()
    with pytest.raises(BackendUnavailable, match="'contract'"):
        provider.open(params, PIN_BYTES)


def test_a_token_plugged_in_later_is_found(softhsm: SoftHsm, provider: Pkcs11Provider) -> None:
    with pytest.raises(BackendUnavailable, match="'later'"):
        provider.new_params({"module": MODULE, "token": "later"})
    softhsm.make_token("later")
    provider.open(provider.new_params({"module": MODULE, "token": "later"}), PIN_BYTES).close()


def test_tokens_with_one_label_are_told_apart_by_serial_number(softhsm: SoftHsm, provider: Pkcs11Provider) -> None:
    serial = provider.new_params(WISH)["token_serial"]
    softhsm.make_token("contract")
    with pytest.raises(UsageError, match="give the serial number"):
        provider.new_params(WISH)
    assert provider.new_params({"module": MODULE, "token": serial})["token_serial"] == serial


def test_modules_come_from_the_configuration_only(provider: Pkcs11Provider) -> None:
    params = provider.new_params(WISH)
    for module in ("other", MODULE_PATH, "../" + MODULE):
        with pytest.raises(BackendUnavailable, match=r"agent\.toml names no PKCS#11 module"):
            provider.open({**params, "module": module}, PIN_BYTES)
    for path, why in (("/nowhere.so", "cannot open"), ("/etc/passwd", "cannot be loaded")):
        with pytest.raises(BackendUnavailable, match=why):
            Pkcs11Provider({MODULE: path}).open(params, PIN_BYTES)


def test_a_key_that_is_there_already_can_be_named(provider: Pkcs11Provider) -> None:
    with own_session() as session:
        key_id = make_key(session, EXTRACTABLE=False, SENSITIVE=True)
    root = provider.open(provider.new_params({**WISH, "key_id": key_id}), PIN_BYTES)
    assert root.unwrap(root.wrap(SEED, CONTEXT), CONTEXT) == SEED
    root.close()
    with pytest.raises(Denied, match="not in the token"):
        provider.open(provider.new_params({**WISH, "key_id": b"no such key"}), PIN_BYTES)


@pytest.mark.parametrize(
    ("bits", "attributes", "why"),
    [
        (256, {"EXTRACTABLE": True, "SENSITIVE": True}, "could be read out"),
        (256, {"EXTRACTABLE": False, "SENSITIVE": False}, "could be read out"),
        (128, {"EXTRACTABLE": False, "SENSITIVE": True}, "256 bits"),
    ],
)
def test_a_key_that_is_too_weak_is_refused(
    provider: Pkcs11Provider, bits: int, attributes: dict[str, bool], why: str
) -> None:
    with own_session() as session:
        key_id = make_key(session, bits, **attributes)
    params = provider.new_params({**WISH, "key_id": key_id})
    with pytest.raises(Denied, match=why):
        provider.open(params, PIN_BYTES)
    # The refused login is not left behind.
    with pytest.raises(WrongSecret, match="the token counts"):
        provider.open(params, b"000000")


def test_the_module_may_be_left_out_if_there_is_one(provider: Pkcs11Provider) -> None:
    assert provider.new_params({"token": "contract"})["module"] == MODULE
    with pytest.raises(UsageError, match=r"needs a module \(a, b\)"):
        Pkcs11Provider({"a": MODULE_PATH, "b": MODULE_PATH}).new_params({"token": "contract"})
    with pytest.raises(UsageError, match="none is configured"):
        Pkcs11Provider({}).new_params({"token": "contract"})


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"module": MODULE},
        {"token": 1},
        {**WISH, "key_id": "text"},
        {**WISH, "key_id": bytes(65)},
        {**WISH, "pin": PIN},
    ],
)
def test_wishes_that_make_no_sense_are_refused(provider: Pkcs11Provider, wish: Params) -> None:
    with pytest.raises(UsageError):
        provider.new_params(wish)


@dataclass
class LockingToken:
    """A token with the flags a PIN-counting one has after a wrong PIN: SoftHSM never gets so far."""

    before: pkcs11.TokenFlag
    after: pkcs11.TokenFlag
    error: type[pkcs11.PKCS11Error] = pkcs11.PinIncorrect
    tried: int = 0
    label: str = "contract"
    serial: bytes = b"1"

    @property
    def flags(self) -> pkcs11.TokenFlag:
        return self.after if self.tried else self.before

    def open(self, user_pin: str) -> pkcs11.Session:
        self.tried += 1
        raise self.error


F = pkcs11.TokenFlag
PARAMS: Params = {
    "mechanism": "aes-256-gcm",
    "module": MODULE,
    "token_label": "contract",
    "token_serial": "1",
    "key_id": b"k",
}


@pytest.mark.parametrize(
    ("token", "error", "why", "tried"),
    [
        (LockingToken(F(0), F.USER_PIN_COUNT_LOW), WrongSecret, "counts them", 1),
        (LockingToken(F(0), F.USER_PIN_COUNT_LOW | F.USER_PIN_FINAL_TRY), WrongSecret, "one more wrong one", 1),
        (LockingToken(F.USER_PIN_FINAL_TRY, F.USER_PIN_LOCKED), Denied, "has locked it now", 1),
        (LockingToken(F.USER_PIN_LOCKED, F.USER_PIN_LOCKED), Denied, "after too many wrong ones", 0),
        (LockingToken(F(0), F(0)), WrongSecret, "^wrong PIN$", 1),
        (LockingToken(F(0), F(0), pkcs11.PinLenRange), WrongSecret, "^wrong PIN$", 1),
        (LockingToken(F(0), F(0), pkcs11.PinLocked), Denied, "has locked its PIN", 1),
        (LockingToken(F(0), F(0), pkcs11.PinExpired), Denied, "changed first", 1),
        (LockingToken(F(0), F(0), pkcs11.UserPinNotInitialized), Denied, "has no PIN yet", 1),
        (LockingToken(F(0), F(0), pkcs11.DeviceRemoved), BackendUnavailable, "DeviceRemoved", 1),
        (LockingToken(F(0), F(0), pkcs11.GeneralError), BackendUnavailable, "GeneralError", 1),
    ],
)
def test_what_a_token_says_of_a_pin(
    provider: Pkcs11Provider, monkeypatch: pytest.MonkeyPatch, token: LockingToken, error: type[Exception], why: str,
    tried: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(provider._tokens, "_tokens", lambda _module: [token])
    token.tried = 0
    with pytest.raises(error, match=why):
        provider.open(PARAMS, b"123")
    assert token.tried == tried
