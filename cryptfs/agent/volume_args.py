"""Arguments that several verbs about a `volume` file take: secrets, a protector to be made, a policy."""

from __future__ import annotations

from contextlib import ExitStack

from cryptfs.agent import args as arg
from cryptfs.agent.args import Args
from cryptfs.agent.unlocking import Key, NewProtector
from cryptfs.crypto.secret import Secret
from cryptfs.errors import ProtocolError, UsageError
from cryptfs.format.policy import BOUNDS, Policy
from cryptfs.format.volume import LABEL_MAX_CHARS, PROTECTORS_MAX
from cryptfs.types import ID_BYTES

SECRET_MAX_BYTES = 64 << 10


def get_shred_secret(args: Args) -> bytes:
    """The secret, or what leads to it; empty if none is given."""
    return arg.get_bytes(args, "shred_secret", 0, SECRET_MAX_BYTES)


def get_new_protector(args: Args, now_s: int) -> NewProtector:
    """The arguments `kind`, `wish` and `label`."""
    return NewProtector(
        kind=arg.get_text(args, "kind", LABEL_MAX_CHARS),
        wish=arg.get_plain_map(args, "wish"),
        label=arg.get_text(args, "label", LABEL_MAX_CHARS),
        created_s=now_s,
    )


def get_policy(args: Args, name: str) -> Policy:
    """A map of policy fields (FORMAT.md §3). Raises `UsageError` for a value out of bounds."""
    value = args[name]
    if not isinstance(value, dict):
        raise ProtocolError(f"{name} must be a map")
    for field, number in value.items():
        if field not in BOUNDS:
            raise UsageError(f"a policy has no field {field!r}")
        if type(number) is not int:
            raise ProtocolError(f"the policy's {field} must be an int")
    return Policy(**value)


def get_keys(args: Args, name: str, stack: ExitStack) -> list[Key]:
    """An array of [protector id, secret], each secret wiped with `stack`."""
    rows = args[name]
    if type(rows) is not list or len(rows) > PROTECTORS_MAX:
        raise ProtocolError(f"{name} must be an array of at most {PROTECTORS_MAX}")
    keys: list[Key] = []
    for row in rows:
        if type(row) is not list or len(row) != 2 or type(row[0]) is not bytes or type(row[1]) is not bytes:
            raise ProtocolError(f"{name} must hold [protector id, secret] each")
        if len(row[0]) != ID_BYTES or not 1 <= len(row[1]) <= SECRET_MAX_BYTES:
            raise ProtocolError(f"{name} must hold [protector id, secret] each")
        keys.append(Key(stack.enter_context(Secret.of(row[1])), protector_id=row[0]))
    if len({key.protector_id for key in keys}) != len(keys):
        raise ProtocolError(f"{name} names a protector twice")
    return keys
