"""A sidecar with a damaged head in its middle: what can still be told from the frames behind it (FORMAT.md §5).

Each frame carries the MAC of the one before, so frames that follow a gap and link to one another are a whole piece of
the log's history, whoever left them there. Taken up at the first of them, the file is for every block what the
undamaged log would say, or unknown. So it is no more than cutting the undamaged log behind the same frame could yield,
and size, freshness record and epochs are checked as for that.

What a crash tore is no gap: only frames that are known to have been durable are taken up. Whatever is before a durable
frame was durable too, so what fails there was damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cryptfs.errors import Damaged
from cryptfs.format.log import HEAD_BYTES, HEAD_MAGIC, Head, decode_head
from cryptfs.fs.sealed_log import Replay, intact_payload, is_authentic
from cryptfs.types import Buffer

Settled = Callable[[int], bool]
"""Whether everything of a generation is durable: its epoch ended cleanly, or is this one."""


def acknowledged_in_tail(replayed: Replay, mac_key: Buffer, settled: Settled) -> int:
    """The newest generation that an authentic head among the tail's bytes shows to be durable, 0 for none.

    A tail is what a crash tore, or what somebody tore so that it looks like it: a frame in it that was once durable
    says so, and one of an epoch that ended cleanly was durable itself.
    """
    raw, found = replayed.raw, 0
    at = raw.find(HEAD_MAGIC, len(raw) - replayed.tail)
    while at >= 0:
        head = _head_at(replayed, mac_key, at)
        if head is not None:
            found = max(found, head.durable_up_to, head.generation if settled(head.generation) else 0)
        at = raw.find(HEAD_MAGIC, at + 1)
    return found


def take_up(replayed: Replay, mac_key: Buffer, settled: Settled) -> Replay:
    """The log of a file from its last gap on, if it has any that no crash explains; else `replayed` itself.

    `replayed` is authenticated. What comes back has `gap` set, and its `tail` is judged as any other is. Never raises.
    """
    if not replayed.tail:
        return replayed
    acknowledged = acknowledged_in_tail(replayed, mac_key, settled)
    newest = replayed.heads[-1].generation if replayed.heads else 0
    best = replayed
    for chain in _chains(replayed, mac_key):
        first = chain.heads[0].generation
        if newest < first <= acknowledged:
            best = chain
        newest = max(newest, chain.heads[-1].generation)
    return best


def _chains(replayed: Replay, mac_key: Buffer) -> Iterator[Replay]:
    """The unbroken pieces of history in the tail, in the order they lie there, each as a log of its own."""
    raw = replayed.raw
    view = memoryview(raw)
    at = raw.find(HEAD_MAGIC, len(raw) - replayed.tail)
    while at >= 0:
        chain = Replay(replayed.header, raw=raw, gap=True)
        end = at
        while (head := _head_at(replayed, mac_key, end)) is not None:
            before = chain.heads[-1] if chain.heads else None
            if before is not None and (head.prev_mac != before.mac or head.generation <= before.generation):
                break
            chain.heads.append(head)
            chain.payloads.append(intact_payload(view, end, head))
            end += head.frame_bytes
            chain.ends.append(end)
        if chain.heads:
            chain.tail = max(0, len(raw) - end)
            yield chain
        # Behind the frames just walked, not inside them: every byte is looked at once.
        at = raw.find(HEAD_MAGIC, max(end, at + 1))


def _head_at(replayed: Replay, mac_key: Buffer, at: int) -> Head | None:
    try:
        head = decode_head(replayed.raw[at : at + HEAD_BYTES])
    except Damaged:
        return None
    return head if is_authentic(head, replayed.header.log_id, mac_key) else None
