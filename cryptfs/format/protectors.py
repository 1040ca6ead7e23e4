"""The params of protectors other than passphrases, as they stand in `volume` (FORMAT.md §3). No cryptography here.

Until the file is authenticated every field is what some stranger may have written. So none of them is ever a path, an
address or a command: what a protector on this machine *is* comes from the machine's own configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptfs.errors import UnsupportedFormat, VolumeDamaged

ParamValue = int | str | bytes

KEYFILE = "keyfile"
KEYFILE_MIN_BYTES = 32
KEYFILE_MAX_BYTES = 64 << 10

RECOVERY = "recovery"

PKCS11 = "pkcs11"
MODULE_MAX_CHARS = 64
"""Of the name a module has in the agent's configuration."""
TOKEN_LABEL_MAX_BYTES = 32
"""Fixed by PKCS#11 v2.40 §3.2 (CK_TOKEN_INFO), in UTF-8."""
TOKEN_SERIAL_MAX_BYTES = 16
"""Likewise."""
KEY_ID_MAX_BYTES = 64

SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Pkcs11Params:
    """Which key in which token, through which module.

    `module`: the module's name in the agent's configuration. `token_label` (at most 32 bytes of UTF-8) and
    `token_serial` (at most 16 bytes) name the token, `key_id` (1 … 64 bytes) is the key's CKA_ID.
    """

    module: str
    token_label: str
    token_serial: str
    key_id: bytes


def parse_keyfile(params: Mapping[str, ParamValue]) -> bytes:
    """The salt (16 bytes) of a protector of kind `keyfile`. Raises `VolumeDamaged`, `UnsupportedFormat`."""
    return _salt_of_hkdf(params, "a key file's protector")


def parse_recovery(params: Mapping[str, ParamValue]) -> bytes:
    """The salt (16 bytes) of a protector of kind `recovery`. Raises `VolumeDamaged`, `UnsupportedFormat`."""
    return _salt_of_hkdf(params, "a recovery key's protector")


def parse_pkcs11(params: Mapping[str, ParamValue]) -> Pkcs11Params:
    """The checked parameters of a protector of kind `pkcs11`. Raises `VolumeDamaged`, `UnsupportedFormat`."""
    where = "a PKCS#11 protector"
    _keys(params, {"mechanism", "module", "token_label", "token_serial", "key_id"}, where)
    if params["mechanism"] != "aes-256-gcm":
        raise UnsupportedFormat("a PKCS#11 protector with a mechanism other than aes-256-gcm")
    key_id = params["key_id"]
    if type(key_id) is not bytes or not 1 <= len(key_id) <= KEY_ID_MAX_BYTES:
        raise VolumeDamaged(f"the volume file is damaged: {where} has a key id of a wrong length")
    return Pkcs11Params(
        module=_text(params["module"], MODULE_MAX_CHARS, where),
        token_label=_text(params["token_label"], TOKEN_LABEL_MAX_BYTES, where),
        token_serial=_text(params["token_serial"], TOKEN_SERIAL_MAX_BYTES, where),
        key_id=key_id,
    )


def _salt_of_hkdf(params: Mapping[str, ParamValue], where: str) -> bytes:
    _keys(params, {"kdf", "salt"}, where)
    if params["kdf"] != "hkdf-sha256":
        raise UnsupportedFormat(f"{where} with a KDF other than hkdf-sha256")
    salt = params["salt"]
    if type(salt) is not bytes or len(salt) != SALT_BYTES:
        raise VolumeDamaged(f"the volume file is damaged: the salt of {where} is not {SALT_BYTES} bytes long")
    return salt


def _keys(params: Mapping[str, ParamValue], keys: set[str], where: str) -> None:
    if params.keys() != keys:
        raise VolumeDamaged(f"the volume file is damaged: {where} lacks a field or has one too many")


def _text(value: ParamValue, most: int, where: str) -> str:
    if type(value) is not str or not value or len(value.encode("utf-8", "replace")) > most:
        raise VolumeDamaged(f"the volume file is damaged: a name in {where} is no text of at most {most} bytes")
    return value
