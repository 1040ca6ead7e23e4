"""A root key that never leaves a token: AES-256 behind PKCS#11 (v2.40), used as AES-GCM with our context as AAD.

The key is SENSITIVE and not EXTRACTABLE, so all that passes here is what it wraps. The IV is ours: 12 random bytes. A
token that insists on making the IV itself (some in FIPS mode do) is refused when the protector is made, since the first
wrap fails. C_WrapKey is not used: AES key wrap takes no AAD, and reading the result back needs an extractable object.

Errors. Wrong PIN: `WrongSecret`. Token or module away: `BackendUnavailable`. Key destroyed, PIN locked, login ended:
`Denied`. The key is there and works, and does not open the wrap: `VolumeDamaged` (a module says no more about a
tampered ciphertext than "general error", so the key is asked to open one of its own first).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol, cast

import pkcs11

from cryptfs.errors import BackendUnavailable, Denied, UsageError, VolumeDamaged
from cryptfs.format.protectors import KEY_ID_MAX_BYTES, PKCS11, Pkcs11Params, parse_pkcs11
from cryptfs.ports import Random
from cryptfs.roots.pkcs11_token import TokenName, Tokens
from cryptfs.types import Buffer

IV_BYTES = 12
TAG_BYTES = 16
KEY_ID_BYTES = 16
"""Of the keys made here: random, so that no two ever meet in one token."""
_KEY_BITS = 256
_KEY_LABEL = "cryptfs root key"
_WISHES = frozenset({"module", "token", "key_id"})


class _TokenKey(Protocol):
    """What is used of a `pkcs11.SecretKey`: the binding mixes it in at run time, where a type checker cannot see it."""

    def encrypt(self, data: bytes, *, mechanism: pkcs11.Mechanism, mechanism_param: object) -> bytes: ...
    def decrypt(self, data: bytes, *, mechanism: pkcs11.Mechanism, mechanism_param: object) -> bytes: ...
    def __getitem__(self, key: pkcs11.Attribute) -> object: ...


class Pkcs11Root:
    """A key in a token this process is logged in to, until `close`."""

    def __init__(self, tokens: Tokens, params: Pkcs11Params, random: Random) -> None:
        """The login (`Tokens.log_in`) becomes this object's to end."""
        self._tokens = tokens
        self._params = params
        self._name: TokenName = (params.token_label, params.token_serial)
        self._random = random
        self._closed = False

    def wrap(self, key: Buffer, context: bytes) -> bytes:
        """28 bytes more than `key`: `iv[12] || ciphertext || tag[16]`. Raises `Denied`, `BackendUnavailable`."""
        # A random IV is safe: one root key wraps a handful of keys in its life (NIST SP 800-38D §8.3 allows 2^32).
        iv = self._random(IV_BYTES)
        with self._session() as session:
            return iv + _encrypt(_found(session, self._params.key_id), iv, bytes(key), context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytearray:
        """What was wrapped. Raises `VolumeDamaged`, `Denied`, `BackendUnavailable`: see the module's docstring."""
        if len(wrapped) <= IV_BYTES + TAG_BYTES:
            raise VolumeDamaged("the volume file was changed: what the token's key has wrapped is too short")
        iv, sealed = wrapped[:IV_BYTES], wrapped[IV_BYTES:]
        with self._session() as session:
            # Looked for each time: a handle kept from before may still work after the key was destroyed elsewhere.
            key = _found(session, self._params.key_id)
            try:
                return bytearray(_decrypt(key, iv, sealed, context))
            except (pkcs11.PKCS11Error, ValueError) as error:
                failure = error
            if self._works(key):
                raise VolumeDamaged("the token's key does not open this protector: another key, or a changed file")
        raise BackendUnavailable(f"the token's key does not work: {type(failure).__name__}")

    def close(self) -> None:
        """End this root's share of the login. May be called again."""
        if not self._closed:
            self._closed = True
            self._tokens.log_out(self._params.module, self._name)

    def _session(self) -> AbstractContextManager[pkcs11.Session]:
        if self._closed:
            raise ValueError("the root key was closed")
        return self._tokens.session(self._params.module, self._name)

    def _works(self, key: _TokenKey) -> bool:
        iv, probe = self._random(IV_BYTES), self._random(IV_BYTES)
        try:
            return _decrypt(key, iv, _encrypt(key, iv, probe, b""), b"") == probe
        except pkcs11.PKCS11Error:
            return False


class Pkcs11Provider:
    """Protectors of kind `pkcs11`."""

    kind = PKCS11
    counts_wrong_secrets = True
    revocable = True

    def __init__(self, modules: Mapping[str, str], random: Random = os.urandom, *, needs_network: bool = False) -> None:
        """`modules`: paths of PKCS#11 modules by name, from the agent's configuration."""
        self.needs_network = needs_network
        self._tokens = Tokens(modules)
        self._random = random
        self._to_make: set[bytes] = set()

    def new_params(self, wish: Mapping[str, int | str | bytes]) -> dict[str, int | str | bytes]:
        """For the token ``wish["token"]`` (label or serial number), reached through the module ``wish["module"]``.

        The module may be left out if only one is configured.

        ``wish["key_id"]`` (1 … 64 bytes): the CKA_ID of a key that is there; without it the first `open` with these
        params makes one. Raises `UsageError` for anything else, `BackendUnavailable` if the token is not there.
        """
        names = self._tokens.module_names
        module = wish.get("module", names[0] if len(names) == 1 else None)
        token, key_id = wish.get("token"), wish.get("key_id", b"")
        if wish.keys() - _WISHES or type(module) is not str or type(token) is not str or type(key_id) is not bytes:
            raise UsageError(
                f"a PKCS#11 protector needs a module ({', '.join(names) or 'none is configured'}) and a token"
            )
        if len(key_id) > KEY_ID_MAX_BYTES:
            raise UsageError(f"a PKCS#11 key id has at most {KEY_ID_MAX_BYTES} bytes")
        label, serial = self._tokens.find(module, token)
        if not key_id:
            key_id = self._random(KEY_ID_BYTES)
            # Making a key takes the PIN, which comes with `open`.
            self._to_make.add(key_id)
        return {
            "mechanism": "aes-256-gcm",
            "module": module,
            "token_label": label,
            "token_serial": serial,
            "key_id": key_id,
        }

    def open(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> Pkcs11Root:
        """Log in with the PIN `secret`; the right PIN shows here.

        Raises `VolumeDamaged` or `UnsupportedFormat` for bad `params`, and see the module's docstring.
        """
        checked = parse_pkcs11(params)
        self._tokens.log_in(checked.module, (checked.token_label, checked.token_serial), secret)
        root = Pkcs11Root(self._tokens, checked, self._random)
        try:
            self._ensure_key(checked)
        except BaseException:
            root.close()
            raise
        return root

    def destroy(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> None:
        """Destroy the key in the token, for good. Raises as `open`; `Denied` if the token does not let us."""
        checked = parse_pkcs11(params)
        name = (checked.token_label, checked.token_serial)
        root = self.open(params, secret)
        try:
            with self._tokens.writing_session(checked.module, name) as session:
                try:
                    cast("pkcs11.Object", _found(session, checked.key_id)).destroy()
                except (pkcs11.TokenWriteProtected, pkcs11.SessionReadOnly):
                    raise Denied("the token does not let its key be destroyed: use its own tools") from None
        finally:
            root.close()

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        """For example ``aes-256-gcm in the token 'work' (serial number 4711), module softhsm``."""
        checked = parse_pkcs11(params)
        where = f"the token {checked.token_label!r} (serial number {checked.token_serial})"
        return f"aes-256-gcm in {where}, module {checked.module!r}"

    def _ensure_key(self, params: Pkcs11Params) -> None:
        name = (params.token_label, params.token_serial)
        if params.key_id in self._to_make:
            with self._tokens.writing_session(params.module, name) as session:
                _generate(session, params.key_id)
            self._to_make.discard(params.key_id)
            return
        with self._tokens.session(params.module, name) as session:
            _found(session, params.key_id)


def _generate(session: pkcs11.Session, key_id: bytes) -> None:
    try:
        session.generate_key(
            pkcs11.KeyType.AES,
            _KEY_BITS,
            id=key_id,
            label=_KEY_LABEL,
            store=True,
            capabilities=pkcs11.MechanismFlag.ENCRYPT | pkcs11.MechanismFlag.DECRYPT,
            template={
                pkcs11.Attribute.PRIVATE: True,
                pkcs11.Attribute.SENSITIVE: True,
                pkcs11.Attribute.EXTRACTABLE: False,
                pkcs11.Attribute.MODIFIABLE: False,
            },
        )
    except (pkcs11.TokenWriteProtected, pkcs11.SessionReadOnly):
        raise UsageError("the token is write-protected: make the key with its own tools and give its id") from None


def _found(session: pkcs11.Session, key_id: bytes) -> _TokenKey:
    """The one AES-256 key with this id that cannot leave the token. Raises `Denied` if there is none."""
    keys = list(
        session.get_objects(
            {
                pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
                pkcs11.Attribute.KEY_TYPE: pkcs11.KeyType.AES,
                pkcs11.Attribute.ID: key_id,
            }
        )
    )
    if not keys:
        raise Denied("the root key is not in the token any more")
    if len(keys) > 1:
        raise Denied("the token has more than one key with the root key's id")
    key = cast("_TokenKey", keys[0])
    if key[pkcs11.Attribute.EXTRACTABLE] or not key[pkcs11.Attribute.SENSITIVE]:
        raise Denied("the key in the token could be read out: it must be SENSITIVE and not EXTRACTABLE")
    if key[pkcs11.Attribute.VALUE_LEN] != _KEY_BITS // 8:
        raise Denied("the key in the token is not one of 256 bits")
    return key


def _encrypt(key: _TokenKey, iv: bytes, plain: bytes, aad: bytes) -> bytes:
    try:
        return bytes(key.encrypt(plain, mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=_gcm(iv, aad)))
    except (pkcs11.MechanismInvalid, pkcs11.MechanismParamInvalid):
        raise Denied("the token does not do AES-GCM with an IV that it is given") from None


def _decrypt(key: _TokenKey, iv: bytes, sealed: bytes, aad: bytes) -> bytes:
    return bytes(key.decrypt(sealed, mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=_gcm(iv, aad)))


def _gcm(iv: bytes, aad: bytes) -> pkcs11.GCMParams:
    return pkcs11.GCMParams(iv, aad, 8 * TAG_BYTES)
