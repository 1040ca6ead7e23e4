"""The daemon's part of a KEK rotation: when to rewrite everything, at which pace, and telling how far it is.

There is something to do whenever the `volume` file holds an older KEK besides the newest: after `cryptfs rotate --kek`,
and after a mount of a volume that was left in the middle of it. So nothing is remembered, and a daemon that is killed
is gone on for by the next one. A cancelled rotation waits for the word to go on, or for the next mount.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import trio

from cryptfs.errors import AgentUnavailable, CryptfsError, VolumeDamaged, VolumeLocked
from cryptfs.format.volume import Volume as VolumeFile
from cryptfs.format.volume import parse_volume
from cryptfs.fs.pace import Pace
from cryptfs.fs.rotation import Rotation
from cryptfs.fs.volume import Volume
from cryptfs.fuse.gate import Traffic
from cryptfs.keys.link import AgentLink
from cryptfs.keys.rotation_requests import IDS_MAX, Report

log = logging.getLogger("cryptfs")

SHARE = 0.05
"""Of the time. What programs do is to take at most a quarter longer (docs/PERFORMANCE.md)."""
WORKERS = 4
"""Logs at a time while nobody uses the mount. A program that comes back has to share with those that are begun."""
QUIET_S = 1.0
"""So long after the last request nobody does."""
REPORT_S = 1.0
RETRY_S = 5.0
"""How often it is tried again while there are no keys to be had."""

_EVENTS = frozenset({"changed", "rotate-start", "rotate-cancel", "unlocked", "back"})
"""What the agent pushes that may mean work, or its end."""


class Quiet:
    """Whether nobody uses a mount, which is found out by asking often."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._seen = -1
        self._since_s = 0.0

    def lasts(self) -> bool:
        """Whether the last request was answered `QUIET_S` ago, or earlier, and none was seen since."""
        now_s, begun = trio.current_time(), self._traffic.begun
        if begun != self._seen or begun != self._traffic.answered:
            self._seen, self._since_s = begun, now_s
        return now_s - self._since_s >= QUIET_S


class Rotating:
    """One per mount. `on_event` gets what the agent pushes; `serve` runs beside the volume's other work."""

    def __init__(self, link: AgentLink, volume: Volume, traffic: Traffic) -> None:
        """`traffic`: the mount's, which what is rewritten must not slow down."""
        self._pace = Pace(SHARE, WORKERS, Quiet(traffic).lasts)
        self._link = link
        self._volume = volume
        self._wake = trio.Event()
        self._wake.set()
        self._cancelled = False
        self._scope: trio.CancelScope | None = None
        self._rotation: Rotation | None = None

    def on_event(self, kind: str, event: Mapping[str, Any]) -> None:  # noqa: ARG002 - they say no more
        """See `AgentLink`. Never blocks."""
        if kind not in _EVENTS:
            return
        if kind == "rotate-cancel":
            self._cancelled = True
            if self._scope is not None:
                self._scope.cancel()
        elif kind == "rotate-start":
            self._cancelled = False
        self._wake.set()

    async def serve(self) -> None:
        """For ever: look whether there is something to do whenever that may have changed."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            try:
                await self._look()
            except (VolumeLocked, AgentUnavailable):
                # Until there is an agent again that holds the volume.
                with trio.move_on_after(RETRY_S):
                    await self._wake.wait()
                self._wake.set()
            except (CryptfsError, OSError) as error:
                log.error("the volume file cannot be used as it is now: %s", error)  # noqa: TRY400

    async def _look(self) -> None:
        now = await self._file()
        ctx = self._volume.ctx
        if now.volume_key.wrapped != ctx.config.volume_key_wrapped:
            await ctx.adopt_volume_key(now.volume_key.kek_version, now.volume_key.wrapped)
        if not has_older(now):
            return
        if ctx.read_only:
            await self._say(Report(now.kek_version, "stopped", message="the volume is mounted read-only"))
            return
        if self._rotation is None or self._rotation.kek_version != now.kek_version:
            self._rotation = Rotation(self._volume, now.kek_version, self._pace)
        if self._cancelled:
            await self._say(_report(self._rotation, "cancelled"))
        else:
            await self._rotate(self._rotation)

    async def _file(self) -> VolumeFile:
        """The `volume` file as it is now, once the agent has found it authentic. Raises `VolumeDamaged`, key errors."""
        while (data := self._link.read_volume()) != self._link.shown:
            # This reads the file again. If it was replaced in between, the next turn sees that.
            await self._link.reattach()
        now, config = parse_volume(data), self._volume.ctx.config
        same = (now.volume_id, now.block_size, now.root_dir_id)
        if same != (config.volume_id, config.block_size, config.root_dir_id):
            raise VolumeDamaged("the volume file is that of another volume")
        return now

    # one rotation ----------------------------------------------------------------------------------------------

    async def _rotate(self, rotation: Rotation) -> None:
        """Until it is done, cancelled, or stopped by something. Raises `VolumeLocked` if that were keys."""
        log.info("rewriting everything under KEK version %d", rotation.kek_version)
        state, message = "cancelled", ""
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, rotation)
                state, message = await _outcome(rotation)
                nursery.cancel_scope.cancel()
        self._scope = None
        if state == "stopped":
            log.error("the rotation has stopped: %s", message)
        elif state == "done":
            log.info("all is under KEK version %d but for %d logs", rotation.kek_version, len(rotation.left))
        else:
            log.info("the rotation is %s", state)
        await self._say(_report(rotation, state, message))
        if state == "waiting":
            raise VolumeLocked("no keys are to be had for the rotation")

    async def _tell(self, rotation: Rotation) -> None:
        while True:
            await self._say(_report(rotation, "running"))
            await trio.sleep(REPORT_S)

    async def _say(self, report: Report) -> None:
        # Nobody may be there to be told; whoever asks later is told then.
        with suppress(CryptfsError):
            await self._link.report_rotation(report)


async def _outcome(rotation: Rotation) -> tuple[str, str]:
    """(state, message) of a report."""
    try:
        await rotation.run()
    except (VolumeLocked, AgentUnavailable):
        return "waiting", "the volume is locked, or the key agent is away"
    except OSError as error:
        return "stopped", error.strerror or str(error)
    except CryptfsError as error:
        return "stopped", str(error)
    return "done", ""


def has_older(volume: VolumeFile) -> bool:
    """Whether the file holds KEKs of older versions than the newest."""
    return any(kek.kek_version < volume.kek_version for protector in volume.protectors for kek in protector.keks)


def _report(rotation: Rotation, state: str, message: str = "") -> Report:
    now = rotation.progress
    ids = tuple(sorted(rotation.left))[:IDS_MAX] if state == "done" else ()
    return Report(
        rotation.kek_version, state, now.done, now.total, now.failed, len(rotation.left), message, ids
    )  # fmt: skip
