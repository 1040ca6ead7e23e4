"""Params of protectors as a stranger may have written them: taken apart, or refused with one of two errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryptfs.errors import UnsupportedFormat, VolumeDamaged
from cryptfs.format.protectors import (
    KEY_ID_MAX_BYTES,
    MODULE_MAX_CHARS,
    SALT_BYTES,
    TOKEN_LABEL_MAX_BYTES,
    TOKEN_SERIAL_MAX_BYTES,
    ParamValue,
    Pkcs11Params,
    parse_keyfile,
    parse_pkcs11,
    parse_recovery,
)

Parse = Callable[[Mapping[str, ParamValue]], object]

HKDF: dict[str, ParamValue] = {"kdf": "hkdf-sha256", "salt": bytes(SALT_BYTES)}
TOKEN: dict[str, ParamValue] = {
    "mechanism": "aes-256-gcm", "module": "soft", "token_label": "card", "token_serial": "1", "key_id": b"k",
}  # fmt: skip
KINDS: list[tuple[Parse, dict[str, ParamValue]]] = [
    (parse_keyfile, HKDF),
    (parse_recovery, HKDF),
    (parse_pkcs11, TOKEN),
]
VALUES = st.one_of(st.integers(), st.text(max_size=80), st.binary(max_size=80))


@pytest.mark.parametrize(("parse", "good"), KINDS)
def test_what_is_written_is_read(parse: Parse, good: dict[str, ParamValue]) -> None:
    assert parse(good) in (bytes(SALT_BYTES), Pkcs11Params("soft", "card", "1", b"k"))


@pytest.mark.parametrize(("parse", "good"), KINDS)
def test_another_algorithm_is_a_newer_format_and_no_damage(parse: Parse, good: dict[str, ParamValue]) -> None:
    name = "kdf" if "kdf" in good else "mechanism"
    with pytest.raises(UnsupportedFormat):
        parse({**good, name: "rot13"})


@given(st.data())
def test_whatever_else_is_there_is_refused(data: st.DataObject) -> None:
    parse, good = data.draw(st.sampled_from(KINDS))
    name = data.draw(st.sampled_from([*good, "another"]))
    value = data.draw(VALUES)
    try:
        parse({**good, name: value})
    except (VolumeDamaged, UnsupportedFormat):
        return
    assert type(value) is type(good[name])
    size = len(value.encode() if isinstance(value, str) else value) if not isinstance(value, int) else 0
    most = {
        "salt": SALT_BYTES, "module": MODULE_MAX_CHARS, "token_label": TOKEN_LABEL_MAX_BYTES,
        "token_serial": TOKEN_SERIAL_MAX_BYTES, "key_id": KEY_ID_MAX_BYTES, "kdf": 11, "mechanism": 11,
    }  # fmt: skip
    assert 1 <= size <= most[name]
