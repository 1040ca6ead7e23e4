"""Tokens behind PKCS#11 modules (PKCS#11 v2.40): which are there, and one login to each that several roots share.

PKCS#11 logs a *process* in to a token, not a session: a second C_Login fails with CKR_USER_ALREADY_LOGGED_IN whatever
PIN it brings. So there is one session per token, and who comes second shows the same PIN as the first, of which a MAC
under a key of this process is kept for that, not the PIN.

A module is some vendor's C library. It is loaded when it is first needed, which is after the agent has confined itself:
what it may do then is what the configuration grants (docs/KEYS.md, "PKCS#11"). When the last session ends the module is
finalized: sessions that a refused PIN left open end with it, and tokens plugged in later are seen at the next start.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pkcs11

from cryptfs.crypto.mac import mac
from cryptfs.errors import BackendUnavailable, Denied, UsageError, WrongSecret
from cryptfs.types import Buffer

TokenName = tuple[str, str]
"""(label, serial number)"""

_PIN_KEY_BYTES = 32


@dataclass(slots=True)
class _Login:
    """A token this process is logged in to."""

    session: pkcs11.Session
    pin_mac: bytes
    users: int = 0


class Tokens:
    """All modules and tokens of this process. Every call into a module is made under one lock.

    The lock: an operation is C_EncryptInit and then C_Encrypt on the session, and no other may come between; and not
    every module is safe with threads.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        """`modules`: paths of shared libraries by name, from the machine's configuration."""
        self._modules = dict(modules)
        self._loaded: dict[str, Any] = {}
        self._logins: dict[tuple[str, TokenName], _Login] = {}
        self._pin_key = os.urandom(_PIN_KEY_BYTES)
        self._lock = threading.Lock()

    @property
    def module_names(self) -> list[str]:
        """The names the configuration has."""
        return sorted(self._modules)

    def find(self, module: str, wanted: str) -> TokenName:
        """The token with this label or serial number. Raises `BackendUnavailable`; `UsageError` if it is not one."""
        with self._lock, _told_apart():
            found = [_name(token) for token in self._tokens(module) if wanted in _name(token)]
            self._finalize_unless_used(module)
        if not found:
            raise BackendUnavailable(f"no token with the label or serial number {wanted!r} is there")
        if len(found) > 1:
            raise UsageError(f"{len(found)} tokens are called {wanted!r}: give the serial number")
        return found[0]

    def log_in(self, module: str, name: TokenName, pin: Buffer) -> None:
        """Log in to a token, or join the login that there is; to be undone by one `log_out`.

        Raises `WrongSecret` (with what the token says of tries left), `Denied` if it has locked the PIN,
        `BackendUnavailable`.
        """
        with self._lock:
            login = self._logins.get((module, name))
            shown = mac(self._pin_key, bytes(pin))
            if login is not None:
                if not hmac.compare_digest(login.pin_mac, shown):
                    raise WrongSecret("not the PIN that the token was opened with for another volume")
                login.users += 1
                return
            try:
                session = self._new_session(module, name, pin)
            except BaseException:
                self._finalize_unless_used(module)
                raise
            self._logins[module, name] = _Login(session, shown, users=1)

    def log_out(self, module: str, name: TokenName) -> None:
        """One user less; the last one logs out. Never raises for what the token does: it may be gone."""
        with self._lock:
            login = self._logins[module, name]
            login.users -= 1
            if login.users:
                return
            del self._logins[module, name]
            with contextlib.suppress(pkcs11.PKCS11Error):
                login.session.close()
            self._finalize_unless_used(module)

    @contextlib.contextmanager
    def session(self, module: str, name: TokenName) -> Iterator[pkcs11.Session]:
        """The session of a login, alone with it. What the module raises inside comes out as ours."""
        with self._lock, _told_apart():
            yield self._logins[module, name].session

    @contextlib.contextmanager
    def writing_session(self, module: str, name: TokenName) -> Iterator[pkcs11.Session]:
        """A session that may make objects, beside that of a login and with its rights; closed at the end."""
        with self._lock, _told_apart():
            session = self._logins[module, name].session.token.open(rw=True)
            try:
                yield session
            finally:
                session.close()

    def _new_session(self, module: str, name: TokenName, pin: Buffer) -> pkcs11.Session:
        try:
            # The binding wants text, which cannot be wiped (docs/THREAT_MODEL.md); it encodes it as UTF-8 again.
            text = bytes(pin).decode()
        except UnicodeDecodeError:
            raise WrongSecret("a PIN is UTF-8 text; the token was not asked") from None
        with _told_apart():
            token = self._token(module, name)
            if token.flags & pkcs11.TokenFlag.USER_PIN_LOCKED:
                raise Denied("the token has locked its PIN after too many wrong ones")
            try:
                return token.open(user_pin=text)
            except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange):
                refused = self._token(module, name).flags
        if refused & pkcs11.TokenFlag.USER_PIN_LOCKED:
            raise Denied("wrong PIN, and the token has locked it now")
        if refused & pkcs11.TokenFlag.USER_PIN_FINAL_TRY:
            raise WrongSecret("wrong PIN; the token locks it after one more wrong one")
        if refused & pkcs11.TokenFlag.USER_PIN_COUNT_LOW:
            raise WrongSecret("wrong PIN; the token counts them and may lock it")
        raise WrongSecret("wrong PIN")

    def _token(self, module: str, name: TokenName) -> pkcs11.Token:
        found = [token for token in self._tokens(module) if _name(token) == name]
        if len(found) != 1:
            label, serial = name
            raise BackendUnavailable(f"the token {label!r} (serial number {serial}) is not there")
        return found[0]

    def _tokens(self, module: str) -> list[pkcs11.Token]:
        """What is plugged in. One token that fails must not hide the others, so each slot is asked by itself."""
        tokens = []
        for slot in self._module(module).get_slots(token_present=True):
            with contextlib.suppress(pkcs11.PKCS11Error):
                tokens.append(slot.get_token())
        return tokens

    def _module(self, module: str) -> Any:  # noqa: ANN401 - pkcs11.lib, which the binding makes a function
        path = self._modules.get(module)
        if path is None:
            raise BackendUnavailable(
                f"this machine's agent.toml names no PKCS#11 module {module!r}"
                f" (it has {', '.join(self.module_names) or 'none'})"
            )
        loaded = self._loaded.get(module)
        if loaded is None:
            try:
                loaded = pkcs11.lib(path)
            except pkcs11.PKCS11Error as error:
                # The loader's own words name the file and the reason, and nothing secret.
                why = str(error) or type(error).__name__
                raise BackendUnavailable(f"the PKCS#11 module {module!r} cannot be loaded: {why}") from None
            self._loaded[module] = loaded
        elif not loaded.initialized:
            loaded.initialize()
        return loaded

    def _finalize_unless_used(self, module: str) -> None:
        loaded = self._loaded.get(module)
        if loaded is not None and loaded.initialized and not any(key[0] == module for key in self._logins):
            with contextlib.suppress(pkcs11.PKCS11Error):
                loaded.finalize()


def _name(token: pkcs11.Token) -> TokenName:
    return token.label, token.serial.decode("utf-8", "replace").strip()


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """What a module returns, as ours: refused for good (`Denied`), of no use now (`BackendUnavailable`)."""
    try:
        yield
    except pkcs11.PinLocked:
        raise Denied("the token has locked its PIN after too many wrong ones") from None
    except pkcs11.PinExpired:
        raise Denied("the token wants its PIN changed first") from None
    except pkcs11.UserPinNotInitialized:
        raise Denied("the token has no PIN yet") from None
    except pkcs11.UserNotLoggedIn:
        raise Denied("the token has ended the login") from None
    except pkcs11.PKCS11Error as error:
        # Their text is empty or names a mechanism; the class is the return value (CKR_…).
        raise BackendUnavailable(f"the token does not answer as it should: {type(error).__name__}") from None
