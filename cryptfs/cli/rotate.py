"""`cryptfs rotate DIR`: a new key encryption key, everything rewritten under it, the old ones destroyed.

Three steps, each of which is whole or not done: the `volume` file gets a new KEK version; every log is rewritten under
it, by the daemon if the volume is mounted, else here; the older versions leave the `volume` file. What a crash leaves
between them works, and is gone on with by the next call or mount.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import located, protectors, ui
from cryptfs.cli.advice import hinted
from cryptfs.errors import Damaged, UsageError

if TYPE_CHECKING:
    from cryptfs.cli.protectors import Given
    from cryptfs.format.volume import Volume


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.option("--kek", is_flag=True, help="Make a new key encryption key and rewrite everything under it.")
@click.option("--destroy-old", is_flag=True, help="Destroy the older keys once nothing needs them.")
@click.option("--background", is_flag=True, help="Do not wait: the mounted volume goes on by itself.")
@click.option("--status", "look", is_flag=True, help="Show how far a rotation is.")
@click.option("--cancel", is_flag=True, help="Stop rewriting, until the next `rotate` or mount.")
@click.option(
    "--keep",
    metavar="NAME[=FILE]",
    multiple=True,
    help="Another protector that goes on opening the volume, with its secret in FILE, or asked for. May be repeated.",
)
@click.option("--drop-others", is_flag=True, help="Leave out protectors that are not given a secret, without asking.")
@click.option(
    "--lose-what-failed", is_flag=True, help="With --destroy-old: also if some files need the old keys. They are lost."
)
@click.option("--json", "as_json", is_flag=True, help="With --status: print a JSON document.")
@protectors.options
def rotate(  # noqa: PLR0913 - one parameter per option
    dir: Path,  # noqa: A002
    *,
    kek: bool,
    destroy_old: bool,
    background: bool,
    look: bool,
    cancel: bool,
    keep: tuple[str, ...],
    drop_others: bool,
    lose_what_failed: bool,
    as_json: bool,
    given: Given,
) -> int:
    """Replace the key encryption key of the volume DIR, mounted or not; no data file is touched.

    An old copy of the volume's keys opens nothing that is in the volume now, once the old key is destroyed.
    """
    from cryptfs.cli import kept, rotating
    from cryptfs.ops.info import read_volume

    cipher_dir = located.cipher_dir_of(dir)
    _check_options(kek or destroy_old, look, cancel, background=background, destroy_old=destroy_old, as_json=as_json)
    if look:
        return _show(cipher_dir, as_json=as_json)
    if cancel:
        if rotating.cancel(cipher_dir):
            ui.done("the rewriting stops; `cryptfs rotate DIR --kek`, or the next mount, goes on with it")
        else:
            ui.note("nothing is being rewritten")
        return 0
    if background:
        rotating.check_mounted(cipher_dir)
    if keep and not kek:
        raise UsageError("--keep goes with --kek")
    others = kept.kept(read_volume(cipher_dir), keep)
    unfinished, wanted = kek and rotating.is_unfinished(cipher_dir), kek
    with rotating.unlocked(cipher_dir, given, secret_wanted=kek) as secret:
        rotating.check_in_use(cipher_dir, given)
        if unfinished:
            ui.note("an earlier rotation may not be finished: going on with that one")
            # If there was nothing left to do, it was finished, and this call is about another one.
            wanted = not background and rotating.rewrite(cipher_dir, given).did_nothing
        if wanted:
            version = rotating.add_version(cipher_dir, secret, others, drop_others=drop_others)
            ui.done(f"new keys are made under key version {version} from now on")
        if not older_versions(read_volume(cipher_dir)):
            ui.note("there is no older key")
            return 0
        if background:
            rotating.start(cipher_dir)
            ui.note(f"everything is being rewritten; `cryptfs rotate {dir} --status` shows how far it is")
            return 0
        outcome = rotating.rewrite(cipher_dir, given)
        if outcome.left:
            _say_what_is_left(cipher_dir, given, outcome)
        else:
            ui.done(f"everything is under key version {outcome.kek_version}")
        if destroy_old and (not outcome.left or lose_what_failed):
            rotating.destroy_older(cipher_dir)
            ui.done("the older keys are destroyed")
            return 0
    return Damaged.exit_code if outcome.left else 0


def _check_options(work: bool, look: bool, cancel: bool, *, background: bool, destroy_old: bool, as_json: bool) -> None:
    if work + look + cancel != 1:
        raise hinted(
            UsageError("say what is to be done: --kek, --destroy-old, --status or --cancel"),
            "`cryptfs rotate DIR --kek` makes a new key and rewrites everything under it",
        )
    if background and destroy_old:
        raise UsageError("--destroy-old waits until everything is rewritten: not with --background")
    if as_json and not look:
        raise UsageError("--json goes with --status")


def _show(cipher_dir: Path, *, as_json: bool) -> int:
    from cryptfs.cli import rotating
    from cryptfs.ops.info import read_volume

    volume = read_volume(cipher_dir)
    known = rotating.known(volume)
    attached = known is not None and known.attached
    report = known.report if known is not None and known.attached else None
    # The agent may have been killed while it was mounted: its daemon is there all the same.
    mounted_on = None if attached else rotating.served_on(cipher_dir)
    older = older_versions(volume)
    if as_json:
        ui.out_json(
            {
                "kek_version": volume.kek_version,
                "older_versions": older,
                "mounted": attached or mounted_on is not None,
                "state": None if report is None else report.state,
                "done": None if report is None else report.done,
                "total": None if report is None else report.total,
                "failed": None if report is None else report.failed,
                "left": None if report is None or report.state != "done" else report.left,
                "message": None if report is None else report.message or None,
                "failed_ids": [] if report is None else [log_id.hex() for log_id in report.ids],
            }
        )
        return 0
    held = f", older ones held: {', '.join(map(str, older))}" if older else ""
    ui.out(f"key version {volume.kek_version}{held}")
    if report is None:
        if mounted_on is not None:
            ui.out(
                f"mounted on {mounted_on}, whose daemon has no key agent: nothing is rewritten until it is unlocked "
                "again (`cryptfs unlock DIR`) and something in the mount is looked at"
            )
        elif attached and older:
            ui.out("mounted: its daemon has not said yet how far it is")
        elif older:
            ui.out("not mounted: `cryptfs rotate DIR --kek`, or the next mount, goes on with what is not rewritten")
        return 0
    ui.out(f"{report.state}: {report.done} of {report.total} rewritten, {report.failed} failed")
    if report.message:
        ui.out(report.message)
    return 0


def older_versions(volume: Volume) -> list[int]:
    """The KEK versions before the newest that the volume file holds."""
    held = {each.kek_version for protector in volume.protectors for each in protector.keks}
    return sorted(held - {volume.kek_version})


def _say_what_is_left(cipher_dir: Path, given: Given, outcome: object) -> None:
    from cryptfs.cli import rotating

    assert isinstance(outcome, rotating.Outcome)
    ui.warning(f"{outcome.left} things could not be rewritten and still need an older key:")
    for line in rotating.names_of(cipher_dir, given, outcome.ids):
        ui.out(line)
    if outcome.left > len(outcome.ids):
        ui.out(f"… and {outcome.left - len(outcome.ids)} more")
    ui.note("`cryptfs check DIR` says what is wrong with them; the older keys stay until they are repaired or accepted")
