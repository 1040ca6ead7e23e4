"""What the filesystem needs from outside, as protocols: keys, a store, a clock, randomness.

`fs` knows only these. `keys` and `store` implement them, `testing` has fakes, and a composition root
(`daemon`, `cli`) joins them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptfs.types import Buffer, Purpose

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
"""Flags of `Store.rename`, as renameat2(2) has them."""


@dataclass(frozen=True, slots=True)
class KeyRun:
    """`len(wrapped) // width` wrapped keys of one log and purpose, in block order (width: 40, names keys 72).

    `first_block` is what the audit log reports; it means something for `Purpose.BLOCK` only.
    """

    log_id: bytes
    purpose: Purpose
    kek_version: int
    wrapped: Sequence[bytes]
    first_block: int = 0


@dataclass(slots=True)
class FreshKeys:
    """Keys made by the agent for one log: `keys[i]` (32 bytes) and `wrapped[i]` (40).

    The cache overwrites the keys when their time is up and then sets `wiped`: whoever keeps a stock checks it, after
    its last `await`, before it encrypts.
    """

    kek_version: int
    keys: Sequence[memoryview]
    wrapped: Sequence[bytes]
    wiped: bool = False


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """Keys wrapped anew, under KEK `kek_version`. `wrapped[i]`: all keys of run i joined, in the order they came."""

    kek_version: int
    wrapped: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Kit:
    """Everything a file (or directory) that does not exist yet needs: used for exactly one, then gone.

    `names_key`/`names_wrapped` (64/72 bytes) are set for directories only, `deks` for files only. The views are good
    until the next `await` of whoever took the kit; after it, `FsContext.log_key_of` has the log key.
    """

    log_id: bytes
    kek_version: int
    log_key: memoryview
    log_wrapped: bytes
    names_key: memoryview | None
    names_wrapped: bytes | None
    deks: FreshKeys | None


class FreshnessRecord(Protocol):
    """What this machine has seen of the volume, kept outside its cipher directory (docs/FRESHNESS.md).

    A log's *floor* is the generation it must have at least: 0 if it was never seen, `DELETED` if it must not be there
    at all. Methods that wait raise `FreshnessUnavailable`, `AgentUnavailable` or `VolumeLocked`.
    """

    def floor(self, log_id: bytes) -> int:
        """The floor of a log whose key was just handed out; means something until the caller's next `await`."""
        ...

    async def ask_floors(self, log_ids: Sequence[bytes]) -> list[int]:
        """The floors of logs whose keys were not asked for."""
        ...

    async def begin(self, state_sequence: int) -> bool:
        """Show the sequence number `state` has now; whether the volume is seen for the first time.

        Raises `RolledBack` if a later one was seen.
        """
        ...

    async def record(
        self, logs: Mapping[bytes, int], gone: Sequence[bytes] = (), state_sequence: int | None = None
    ) -> None:
        """Raise floors to what is durable now, and bury logs whose deletion is.

        `state_sequence` only if the whole file system was synced since the volume was opened.
        """
        ...

    async def accept(self, logs: Mapping[bytes, int]) -> None:
        """Set floors to what the owner says is right, also of buried logs. It is logged."""
        ...


class DekProvider(FreshnessRecord, Protocol):
    """The only way to a key in clear. Batches only: one round trip to the agent costs as much as 50 keys in it.

    Keys of logs come with their floors. Every method may raise `AgentUnavailable` or `VolumeLocked`. A view handed out
    is valid until the caller's next `await`; after that the cache may have wiped it.
    """

    def peek(self, wrapped: bytes) -> memoryview | None:
        """The key behind `wrapped` if the policy still allows it from the cache, counting one use; never blocks."""
        ...

    def peek_all(self, wraps: Sequence[bytes]) -> list[memoryview] | None:
        """`peek` for several keys; None, and no use counted, unless all of them are there."""
        ...

    async def unwrap(self, runs: Sequence[KeyRun]) -> list[list[memoryview]]:
        """Keys for every run, from the cache or the agent; one round trip at most.

        Raises `Damaged("wrap")` if any key of a run does not unwrap under that log's wrapping key.
        """
        ...

    async def warm(self, runs: Sequence[KeyRun]) -> None:
        """Bring keys into the cache that may be wanted soon, in one round trip.

        Keys that do not unwrap are left out; nothing happens if the agent is away or the cache keeps nothing.
        """
        ...

    async def generate(self, log_id: bytes, purpose: Purpose, count: int) -> FreshKeys:
        """`count` new keys under the newest KEK. Each is to be used for one encryption."""
        ...

    async def rewrap(self, runs: Sequence[KeyRun]) -> Rewrapped:
        """The keys of every run wrapped under the newest KEK; none of them leaves its holder for that.

        What was in the cache under an old wrap is there under the new one, too. Raises `Damaged("wrap")` if any key of
        a run does not unwrap under that log's wrapping key.
        """
        ...

    def renew(self, kek_version: int) -> None:
        """Hand out nothing more that was made under an older KEK than this: kits and stocks that were are dropped."""
        ...

    def take_kit(self) -> Kit | None:
        """A file kit from the stock, or None if it is empty (then call `make_kit`). Starts a refill in time."""
        ...

    async def make_kit(self, *, directory: bool) -> Kit:
        """A kit from the stock or the agent. Its keys are in the cache too, under their wrapped forms."""
        ...


class Clock(Protocol):
    """Time, injected: tests turn it by hand."""

    def monotonic(self) -> float:
        """Seconds that only grow, suspend included where the system can say so (CLOCK_BOOTTIME)."""
        ...

    def time_ns(self) -> int:
        """Nanoseconds of wall-clock time since 1970."""
        ...


class Random(Protocol):
    """`os.urandom`'s shape."""

    def __call__(self, count: int, /) -> bytes: ...


class Store(Protocol):
    """The POSIX calls the volume is made of, one to one, on small integers as descriptors.

    Paths are single names relative to a directory descriptor (or "." for itself); nothing follows a symlink. To `open`,
    `lstat`, `readlink`, `chmod`, `chown` and `utimens` the empty name is what the descriptor itself is, also one of
    O_PATH to something that has no name any more. Every method may raise `OSError`.
    Implementations: `store.local` (the kernel), `store.memory` (a disk model for crash tests).
    All calls may block; callers move the slow ones (`fsync`, `fdatasync`, `syncfs`, cold reads) to a thread.
    """

    def root(self) -> int:
        """A descriptor of the cipher directory, owned by the store (never close it)."""
        ...

    def open(self, dir_fd: int, name: bytes, flags: int, mode: int = 0o600) -> int:
        """openat(2) with O_NOFOLLOW | O_CLOEXEC added."""
        ...

    def close(self, fd: int, /) -> None: ...
    def pread(self, fd: int, count: int, offset: int, /) -> bytes: ...
    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0, /) -> int:
        """preadv2(2); with RWF_NOWAIT raises BlockingIOError or returns short where the data is not in memory."""
        ...

    def pwrite(self, fd: int, data: Buffer, offset: int, /) -> int: ...
    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int, /) -> int: ...
    def ftruncate(self, fd: int, size: int, /) -> None: ...
    def fdatasync(self, fd: int, /) -> None: ...
    def fsync(self, fd: int, /) -> None: ...
    def syncfs(self, fd: int) -> None: ...
    def fstat(self, fd: int, /) -> os.stat_result: ...
    def lstat(self, dir_fd: int, name: bytes) -> os.stat_result: ...
    def listdir(self, fd: int) -> list[bytes]:
        """Names in the directory, without "." and ".."; independent of the descriptor's own offset."""
        ...

    def mkdir(self, dir_fd: int, name: bytes, mode: int = 0o700) -> None: ...
    def rmdir(self, dir_fd: int, name: bytes) -> None: ...
    def unlink(self, dir_fd: int, name: bytes) -> None: ...
    def rename(self, src_fd: int, src: bytes, dst_fd: int, dst: bytes, flags: int = 0) -> None:
        """renameat2(2): flags 0, RENAME_NOREPLACE or RENAME_EXCHANGE."""
        ...

    def link(self, src_fd: int, src: bytes, dst_fd: int, dst: bytes) -> None: ...
    def symlink(self, target: bytes, dir_fd: int, name: bytes) -> None: ...
    def readlink(self, dir_fd: int, name: bytes) -> bytes: ...
    def mknod(self, dir_fd: int, name: bytes, mode: int, rdev: int) -> None: ...
    def chmod(self, dir_fd: int, name: bytes, mode: int) -> None: ...
    def fchmod(self, fd: int, mode: int, /) -> None: ...
    def chown(self, dir_fd: int, name: bytes, uid: int, gid: int) -> None:
        """fchownat(2) with AT_SYMLINK_NOFOLLOW; -1 leaves an id as it is."""
        ...

    def fchown(self, fd: int, uid: int, gid: int) -> None: ...
    def utimens(self, dir_fd: int, name: bytes, atime_ns: int, mtime_ns: int) -> None: ...
    def futimens(self, fd: int, atime_ns: int, mtime_ns: int) -> None: ...
    def fstatvfs(self, fd: int, /) -> os.statvfs_result: ...
    def lock(self) -> None:
        """Take the volume's lock: flock(LOCK_EX | LOCK_NB) on the cipher directory. Raises BlockingIOError if held."""
        ...


class RootKey(Protocol):
    """A root key at hand, derived or remote: wraps KEKs. Only the agent's process ever has one. Calls may block."""

    def wrap(self, key: Buffer, context: bytes) -> bytes:
        """`key` (32 or 40 bytes) wrapped, at most 4096 bytes, and bound to `context` (the AAD of FORMAT.md §3)."""
        ...

    def unwrap(self, wrapped: bytes, context: bytes) -> bytearray:
        """The key (32 or 40 bytes, for the caller to wipe).

        Raises `WrongSecret` if it was not wrapped by this root key under this context ("not mine": the caller goes on
        to the next protector); `CryptfsError` of another kind if the root key's holder fails.
        """
        ...

    def close(self) -> None:
        """Wipe what is held of the root key. May be called again."""
        ...


class RootProvider(Protocol):
    """One kind of protector (FORMAT.md §3): how its parameters and a secret lead to a root key. Calls may block."""

    @property
    def kind(self) -> str:
        """The protector's `kind` in the volume file."""
        ...

    @property
    def needs_network(self) -> bool:
        """Whether the root key's holder is reached by sockets other than Unix ones: if not, the agent has none."""
        ...

    @property
    def counts_wrong_secrets(self) -> bool:
        """Whether the root key's holder counts wrong secrets and may lock itself: then one is tried by name only."""
        ...

    @property
    def revocable(self) -> bool:
        """Whether the root key can be taken back while a volume is unlocked: then it stays open and is asked again."""
        ...

    def new_params(self, wish: Mapping[str, int | str | bytes]) -> dict[str, int | str | bytes]:
        """Parameters for a new protector, as its owner wishes it.

        Each kind knows what can be wished for (a passphrase: `cost`, low, normal or high). Raises `UsageError` for
        anything else.
        """
        ...

    def open(self, params: Mapping[str, int | str | bytes], secret: Buffer) -> RootKey:
        """The root key. A wrong `secret` may show only at `RootKey.unwrap`. Raises `VolumeDamaged` for bad `params`."""
        ...

    def describe(self, params: Mapping[str, int | str | bytes]) -> str:
        """One short line for people."""
        ...
