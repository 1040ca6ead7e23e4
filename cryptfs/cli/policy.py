"""`cryptfs policy DIR`: show and change how long, how often and how fast a volume's keys may be had."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import located, protectors, ui
from cryptfs.cli.durations import Duration
from cryptfs.cli.policy_fields import LABELS, effective, shown
from cryptfs.format.policy import BOUNDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptfs.cli.protectors import Given
    from cryptfs.format.policy import Policy
    from cryptfs.format.volume import Volume

UNSET = "default"
"""On the command line: nothing is set, the program's default holds."""
NOT_SET = -1


class OrDefault(click.ParamType[int]):
    """What another type takes, or the word `default`, which is `NOT_SET`."""

    def __init__(self, inner: click.ParamType[int]) -> None:
        self.inner = inner
        self.name = inner.name

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """An int. Fails as the other type does."""
        return NOT_SET if value == UNSET else int(self.inner.convert(value, param, ctx))


_NUMBER = OrDefault(click.IntRange(min=1))


def _time(field: str) -> OrDefault:
    return OrDefault(Duration(*BOUNDS[field]))


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--max-age", "max_age_s", metavar="T", type=_time("max_age_s"), help="Longest time a key may stay with the daemon."
)
@click.option("--max-entries", metavar="N", type=_NUMBER, help="Most keys the daemon may hold (at least 1024).")
@click.option("--max-uses", metavar="N", type=_NUMBER, help="Uses after which a key is asked for again.")
@click.option("--cache/--no-cache", "caching", default=None, help="Whether a key may serve more than one request.")
@click.option(
    "--idle", "idle_s", metavar="T", type=_time("idle_s"), help="Lock the volume when no key was needed for T."
)
@click.option(
    "--for", "for_s", metavar="T", type=_time("for_s"), help="Lock the volume when it has been unlocked for T."
)
@click.option(
    "--reverify", "reverify_s", metavar="T", type=_time("reverify_s"), help="Ask the root key's holder again every T."
)
@click.option("--unwraps-per-s", metavar="N", type=_NUMBER, help="Keys a second; more have to wait.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@protectors.options
def policy(  # noqa: PLR0913  one parameter per option
    dir: Path,  # noqa: A002
    *,
    max_age_s: int | None,
    max_entries: int | None,
    max_uses: int | None,
    caching: bool | None,
    idle_s: int | None,
    for_s: int | None,
    reverify_s: int | None,
    unwraps_per_s: int | None,
    as_json: bool,
    given: Given,
) -> None:
    """Show the policy of the volume DIR, or of the domain mounted at DIR, or change what is given.

    The word `default` takes a value back. It is part of the volume, and takes effect at once where that is mounted;
    changing it takes the volume's key.
    """
    options = {
        "caching": None if caching is None else int(caching), "for_s": for_s, "idle_s": idle_s, "max_age_s": max_age_s,
        "max_entries": max_entries, "max_uses": max_uses, "reverify_s": reverify_s, "unwraps_per_s": unwraps_per_s,
    }  # fmt: skip
    changes = {name: value for name, value in options.items() if value is not None}
    cipher_dir = located.cipher_dir_of(dir)
    if changes:
        now = _change(cipher_dir, changes, given)
        _warn_of_overrides(cipher_dir, set(changes))
    else:
        from cryptfs.ops.info import read_volume

        now = read_volume(cipher_dir).policy
    if as_json:
        ui.out_json({"policy": effective(now), "set": sorted(now.encode())})
    elif not changes:
        set_here = now.encode()
        rows = [[label, shown(name, effective(now)[name]), "set" if name in set_here else "default"]
                for name, label in LABELS.items()]  # fmt: skip
        ui.table(["policy", "value", ""], rows)


def _change(cipher_dir: Path, changes: Mapping[str, int], given: Given) -> Policy:
    """Put the changed policy in place, unlocking the volume for as long as that takes if it is locked.

    Raises `UsageError` before anything is asked for or changed; `VolumeBusy`, `StoreFailed`, and what `unlock_volume`
    raises.
    """
    from cryptfs.cli import key_agent
    from cryptfs.cli.volume_edit import Edit, opened
    from cryptfs.format.policy import Policy
    from cryptfs.keys.edit_requests import commit, set_policy
    from cryptfs.ops.info import read_volume_file

    def changed(volume: Volume) -> Policy:
        wanted = {**volume.policy.encode(), **changes}
        return Policy(**{name: value for name, value in wanted.items() if value != NOT_SET})

    with Edit.of(cipher_dir) as edit, opened(cipher_dir, given, changed) as volume:
        policy, volume_id = changed(volume), volume.volume_id
        if policy != volume.policy:
            edit.change(
                lambda client, before: set_policy(client, volume_id, before, policy.encode()), in_place=lambda: None
            )
        else:
            # Whoever changed it to this may have been killed before the agent was told.
            key_agent.ask(lambda client: commit(client, volume_id, read_volume_file(cipher_dir)))
    return policy


def _warn_of_overrides(cipher_dir: Path, changed: set[str]) -> None:
    """Say it if a mount does not obey, because its options say otherwise."""
    from cryptfs.cli import key_agent
    from cryptfs.ops.info import read_volume

    found = key_agent.reports().get(read_volume(cipher_dir).volume_id)
    overridden = changed.intersection(found[1].overridden) if found is not None and found[1] is not None else set()
    for name in sorted(overridden):
        ui.warning(f"the options of the mount that is there say otherwise for {LABELS[name]}, and count until it ends")
