"""Rewriting everything in a volume that nobody has mounted under its newest KEK: what its daemon does when it is."""

from __future__ import annotations

from collections.abc import Callable

import trio

from cryptfs.errors import StoreFailed
from cryptfs.fs.pace import Pace
from cryptfs.fs.rotation import Progress, Rotation
from cryptfs.ops.offline import Access, open_to_repair, shut

_SHOW_S = 0.2
WORKERS = 8
"""Logs at a time: the disk makes several durable in the time that it takes for one."""


async def rotate_offline(access: Access, kek_version: int, show: Callable[[Progress], None]) -> Rotation:
    """All of it, as fast as it goes; the rotation, ended: it knows what is `left`.

    Raises `VolumeBusy` if it is mounted, `StoreFailed` (the disk is full, or the volume could not be left cleanly),
    `VolumeDamaged`, key errors. What is done by then stays done.
    """
    looking = await open_to_repair(access)
    clean = False
    try:
        rotation = Rotation(looking.volume, kek_version, Pace(workers=WORKERS))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_shown, rotation, show)
            try:
                await rotation.run()
            except OSError as error:
                raise StoreFailed(f"not everything could be rewritten: {error.strerror}") from error
            finally:
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            clean = await shut(access, looking)
    if not clean:
        raise StoreFailed("the volume could not be left cleanly")
    return rotation


async def _shown(rotation: Rotation, show: Callable[[Progress], None]) -> None:
    while True:
        show(rotation.progress)
        await trio.sleep(_SHOW_S)
