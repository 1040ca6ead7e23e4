"""`cryptfs export DIR PATH DEST`: copy out of a volume without mounting it, past damage if asked."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cryptfs.cli import protectors, ui
from cryptfs.cli.protectors import Given


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.argument("path", type=click.Path(readable=False))
@click.argument("dest", type=click.Path(path_type=Path, readable=False))
@click.option("--skip-damaged", is_flag=True, help="Go on past damage; what is lost becomes zeros and is reported.")
@protectors.options
def export(
    dir: Path,  # noqa: A002
    path: str,
    dest: Path,
    *,
    skip_damaged: bool,
    given: Given,
) -> int:
    """Copy PATH (a path in the volume, `/` for all of it) out of the volume DIR to DEST, mounted or not.

    DEST is made; if it is a directory, the copy goes into it. Nothing that exists is overwritten.
    """
    from cryptfs.cli import progress
    from cryptfs.cli.located import cipher_dir_of
    from cryptfs.cli.volume_access import Reached, with_volume
    from cryptfs.errors import Damaged, VolumeLocked
    from cryptfs.ops.check_report import Tally
    from cryptfs.ops.export import Exported, check_dest, export_tree

    check_dest(cipher_dir_of(dir), dest)
    tally = Tally("copying")

    async def work(reached: Reached) -> Exported:
        async with progress.shown(tally, by_bytes=True):
            return await export_tree(
                reached.access, os.fsencode(path), os.fsencode(dest), skip_damaged=skip_damaged,
                settle=reached.settle, tally=tally, domains=reached.domain,
            )  # fmt: skip

    out = with_volume(dir, given, work, exclusive=False)
    for loss in out.losses:
        ranges = ", ".join(f"{offset}-{offset + length - 1}" for offset, length in loss.lost_bytes)
        what = f"bytes {ranges} could not be read and are zeros" if ranges else "left out"
        ui.warning(f"{os.fsdecode(loss.path)}: {loss.reason}: {what}")
    for left in out.left_out:
        ui.warning(f"{os.fsdecode(left)}: only root may make such a file; left out")
    for where, names in out.xattrs_left_out:
        shown = ", ".join(name.decode("utf-8", "backslashreplace") for name in names)
        ui.warning(f"{os.fsdecode(where)}: extended attributes that could not be set: {shown}")
    for locked in out.locked:
        ui.warning(f"{os.fsdecode(locked)}: a domain that is locked: only its directory was copied")
    for gone in out.shredded:
        ui.note(f"{os.fsdecode(gone)}: a domain that was shredded: there is its directory, and nothing else to copy")
    if out.losses:
        ui.error(f"{len(out.losses)} entries were damaged")
        return Damaged.exit_code
    return VolumeLocked.exit_code if out.locked else 0
