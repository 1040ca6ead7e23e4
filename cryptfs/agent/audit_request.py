"""What a line of the audit log says of a request: which volume, which keys of which files, what else.

Of a request that was answered the arguments are right. Of one that was refused, or is not yet done, they may be
anything, of any type and length: whatever would not pass the verb's own checks is left out, nothing of it gets into a
line, and nothing here raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from cryptfs.agent import args as arg
from cryptfs.errors import CryptfsError
from cryptfs.format.audit import Touched, is_word
from cryptfs.format.volume import FILE_MAX_BYTES, parse_volume
from cryptfs.types import ID_BYTES, WRAPPED_BYTES, WRAPPED_NAMES_BYTES

Detail = Mapping[str, str | int | bool]

_UNKNOWN = "unknown"


def verb_said(verb: str) -> str:
    """The verb, or ``unknown`` if it is no word: it is the client's."""
    return verb if is_word(verb) else _UNKNOWN


def volume_of(verb: str, args: Mapping[str, Any], result: Mapping[str, Any] | None) -> bytes | None:
    """The volume a request is about; None if it names none."""
    for source in (args, result or {}):
        volume_id = source.get("volume_id")
        if type(volume_id) is bytes and len(volume_id) == ID_BYTES:
            return volume_id
    data = args.get("volume")
    if verb in ("unlock", "shred", "shred-check") and type(data) is bytes and len(data) <= FILE_MAX_BYTES:
        with suppress(CryptfsError):
            return parse_volume(data).volume_id
    return None


def detail_of(verb: str, args: Mapping[str, Any]) -> Detail:
    """What else a line says of a request that was answered."""
    if verb == "attach":
        return {name.replace("_", "-"): os.fsdecode(args[name]) for name in ("cipher_dir", "mountpoint")}
    if verb == "hold":
        return {"while-connected": bool(args["while_connected"])}
    if verb in ("detach", "keep"):
        return {"keep": bool(args["keep"])}
    if verb in ("protector-add", "protector-change"):
        return {"kind": str(args["kind"]), "label": str(args["label"])}
    if verb == "protector-remove":
        return {"protector": args["protector_id"].hex()}
    if verb == "feature-add":
        return {"feature": str(args["feature"])}
    if verb == "policy-set":
        return {name.replace("_", "-"): value for name, value in args["policy"].items()}
    if verb == "commit":
        volume = parse_volume(args["volume"])
        return {"serial": volume.serial, "kek-version": volume.kek_version}
    return {}


def files_of(verb: str, args: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[Touched, ...]:
    """What a request that was answered touched."""
    if verb == "unwrap":
        return touched_by(args["items"], result["keys"])
    if verb == "rewrap":
        return touched_by(args["items"], result["wrapped"])
    if verb == "kits":
        keys = (2 if args["directory"] else 1) + args["deks"]
        return tuple([Touched(row[0], "kit", keys) for row in result["kits"]])
    return _named_by(verb, args)


def files_asked_for(verb: str, args: Mapping[str, Any]) -> tuple[Touched, ...]:
    """What a request would touch that was refused, or is about to be done; nothing where its arguments are wrong."""
    try:
        if verb in ("unwrap", "rewrap"):
            arg.get_items(args, "items")
            return touched_by(args["items"], None)
        return _named_by(verb, args)
    except (CryptfsError, LookupError):
        return ()


def _named_by(verb: str, args: Mapping[str, Any]) -> tuple[Touched, ...]:
    if verb == "generate":
        count = arg.get_int(args, "count", 1, arg.KEYS_MAX)
        return (Touched(arg.get_id(args, "id"), arg.get_purpose(args, "purpose").value, count),)
    if verb == "accept":
        width = ID_BYTES + 8
        logs = arg.get_packed(args, "logs", width)
        return tuple([Touched(logs[at : at + ID_BYTES], "log", 0) for at in range(0, len(logs), width)])
    return ()


def touched_by(items: Iterable[Any], keys: list[bytes | None] | None) -> tuple[Touched, ...]:
    """What `unwrap` was asked for, by log, purpose and authenticity; adjacent ranges joined, so they are exact."""
    found: dict[tuple[bytes, str, bool], list[list[int]]] = {}
    for number, (log_id, purpose, _, wrapped, first_block) in enumerate(items):
        authentic = keys is None or keys[number] is not None
        count = len(wrapped) // (WRAPPED_NAMES_BYTES if purpose == "names" else WRAPPED_BYTES)
        ranges = found.setdefault((log_id, purpose, authentic), [])
        if ranges and ranges[-1][0] + ranges[-1][1] == first_block and purpose == "block":
            ranges[-1][1] += count
        else:
            ranges.append([first_block, count])
    return tuple(
        [
            Touched(
                log_id, purpose, sum([count for _, count in ranges]),
                tuple([(first, count) for first, count in ranges]) if purpose == "block" else (), authentic,
            )
            for (log_id, purpose, authentic), ranges in found.items()
        ]
    )  # fmt: skip
