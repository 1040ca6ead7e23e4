"""A recovery key as text: what a person writes down, and what they type back years later.

200 random bits. There is no KDF before them, so they must be out of reach by themselves, also for a quantum computer,
which would need 2^100 steps one after the other; 256 bits would be three groups more to type. As text: ten groups of
five characters of Crockford's base 32 (0-9, A-Z without I, L, O and U), four that carry 20 bits and a check character:

    7K2MQ-0V9TA-XR4DE-...

The check is one symbol of the field GF(2^5), so that w1*c1 + w2*c2 + ... + w5*c5 = g for the group numbered g (1 … 10),
with five different weights. What it finds, with certainty:

- one wrong character in a group: every weight is invertible;
- any two characters of a group exchanged, neighbours or not: the weights differ;
- two characters of different groups exchanged: each group has one wrong character;
- two groups exchanged, or one given twice: the group's number is part of the check;
- a character or a group too few or too many: the length is fixed.

Two wrong characters in one group are missed one time in 32. That costs nothing but a clear message: a wrong key
unwraps nothing. Words (BIP39) would be 19 of them, checked by 9 bits over all: an error is found, not its place.
"""

from __future__ import annotations

KEY_BYTES = 25
GROUPS = 10
GROUP_CHARS = 5
TEXT_CHARS = GROUPS * GROUP_CHARS + GROUPS - 1
"""Of a key as `to_text` writes it."""

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES = {char: value for value, char in enumerate(_ALPHABET)} | {"O": 0, "I": 1, "L": 1}
_SEPARATORS = frozenset(" -_.,:\t\r\n–−")
"""The dashes are what word processors make of a hyphen."""
_DATA_BITS = 20


class BadRecoveryKey(ValueError):
    """The text is no recovery key. The message says where it is wrong, and quotes nothing of it."""


def to_text(key: bytes) -> str:
    """A key of 25 bytes as ten groups of five with hyphens between. Raises `ValueError` for another length."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a recovery key has {KEY_BYTES} bytes")
    number = int.from_bytes(key, "big")
    groups = []
    for index in range(GROUPS):
        bits = number >> (_DATA_BITS * (GROUPS - 1 - index))
        data = [bits >> shift & 31 for shift in (15, 10, 5, 0)]
        # The check character's own weight is 1, so it is what is missing to the group's number.
        data.append(_weighted(data) ^ (index + 1))
        groups.append("".join(_ALPHABET[value] for value in data))
    return "-".join(groups)


def from_text(text: str) -> bytes:
    """The 25 bytes behind what `to_text` made and a person typed.

    Upper or lower case, any separators or none; O is read as 0, I and L as 1. Raises `BadRecoveryKey`.
    """
    if len(text) > 4 * TEXT_CHARS:
        raise BadRecoveryKey("that is too long for a recovery key")
    values = _read(text)
    if len(values) != GROUPS * GROUP_CHARS:
        raise BadRecoveryKey(_wrong_length(text, len(values)))
    number = 0
    wrong = []
    for index in range(GROUPS):
        group = values[GROUP_CHARS * index : GROUP_CHARS * (index + 1)]
        if _weighted(group) != index + 1:
            wrong.append(index + 1)
        for value in group[:-1]:
            number = number << 5 | value
    if wrong:
        raise BadRecoveryKey(f"{_named(wrong)} not right: look for a character misread or exchanged there")
    return number.to_bytes(KEY_BYTES, "big")


def _read(text: str) -> list[int]:
    values: list[int] = []
    for char in text.upper():
        if char in _SEPARATORS:
            continue
        value = _VALUES.get(char)
        if value is None:
            raise BadRecoveryKey(
                f"group {len(values) // GROUP_CHARS + 1} has a character that no recovery key has "
                "(there are digits, and letters but U)"
            )
        values.append(value)
    return values


def _wrong_length(text: str, count: int) -> str:
    """Which group has too few or too many characters, if the groups are told apart."""
    expected = GROUPS * GROUP_CHARS
    how = f"{abs(expected - count)} {'missing' if count < expected else 'too many'}"
    groups = "".join(" " if char in _SEPARATORS else char for char in text).split()
    wrong = [number for number, group in enumerate(groups, 1) if len(group) != GROUP_CHARS]
    if len(groups) == GROUPS and wrong:
        return f"{_named(wrong)} not {GROUP_CHARS} characters long"
    if not wrong and groups:
        return f"there are {len(groups)} groups, and a recovery key has {GROUPS}"
    return f"a recovery key has {expected} characters in {GROUPS} groups: {how}"


def _named(groups: list[int]) -> str:
    if len(groups) == 1:
        return f"group {groups[0]} of {GROUPS} is"
    return f"groups {', '.join(map(str, groups[:-1]))} and {groups[-1]} of {GROUPS} are"


def _weighted(values: list[int]) -> int:
    """The sum in GF(2^5) of four or five values with their weights."""
    total = 0
    for value, weight in zip(values, _WEIGHTS, strict=False):
        total ^= _times(value, weight)
    return total


def _times(a: int, b: int) -> int:
    """The product in GF(2^5) modulo x^5 + x^2 + 1."""
    product = 0
    for bit in range(5):
        if b >> bit & 1:
            product ^= a << bit
    for bit in (8, 7, 6, 5):
        if product >> bit & 1:
            product ^= 0b100101 << bit - 5
    return product


_WEIGHTS = (16, 8, 4, 2, 1)
"""Powers of x, all different; that of the check character is 1."""
