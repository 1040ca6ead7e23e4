"""`cryptfs check DIR`: is everything in a volume what was written, and with `--repair`, make it so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cryptfs.cli import protectors, ui
from cryptfs.cli.protectors import Given
from cryptfs.errors import UsageError

if TYPE_CHECKING:
    from cryptfs.ops.check_report import Report


@click.command()
@click.argument("dir", type=click.Path(path_type=Path, readable=False))
@click.option("--deep", is_flag=True, help="Read and authenticate every block.")
@click.option(
    "--repair", is_flag=True, help="Put right what can be; the rest goes to a directory in the volume. Not mounted."
)
@click.option(
    "--accept",
    "accepted",
    metavar="PATH",
    multiple=True,
    help="Take PATH in the volume as it is now, and all below: you restored, removed or added it. Not mounted.",
)
@click.option("--accept-all", is_flag=True, help="Take the whole volume as it is now, however old. Not mounted.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@protectors.options
def check(
    dir: Path,  # noqa: A002
    *,
    deep: bool,
    repair: bool,
    accepted: tuple[str, ...],
    accept_all: bool,
    as_json: bool,
    given: Given,
) -> int:
    """Check the volume DIR, mounted or not: every name, sidecar and size, with --deep every block.

    Ends with 0 if nothing is damaged, 21 if something is, 24 if --repair put right all there was.
    """
    if accepted or accept_all:
        if deep or repair:
            raise UsageError("accepting, and looking or repairing, are done one after the other")
        return _accept(dir, given, accepted, everything=accept_all, as_json=as_json)
    report = _report(dir, given, deep=deep, repair=repair)
    if as_json:
        ui.out_json(report.as_json())
    else:
        _show(report)
    return exit_code(report)


def _accept(cipher_dir: Path, given: Given, paths: tuple[str, ...], *, everything: bool, as_json: bool) -> int:
    from cryptfs.cli import accept
    from cryptfs.errors import Damaged
    from cryptfs.ops.accept import Outcome

    outcome = Outcome()
    if everything:
        accept.accept_all(cipher_dir, given)
        ui.done(f"{cipher_dir} is taken as it is from now on")
    if paths:
        outcome = accept.accept(cipher_dir, given, paths)
    if as_json:
        ui.out_json(accept.as_json(outcome))
    elif paths:
        accept.show(outcome)
    return Damaged.exit_code if outcome.refused else 0


def _report(cipher_dir: Path, given: Given, *, deep: bool, repair: bool) -> Report:
    from cryptfs.cli import progress
    from cryptfs.cli.volume_access import Reached, with_volume
    from cryptfs.errors import Damaged, VolumeDamaged
    from cryptfs.ops.check import check_volume
    from cryptfs.ops.check_repair import repair_volume
    from cryptfs.ops.check_report import Finding, Severity, Tally, What

    async def work(reached: Reached) -> Report:
        tally = Tally()
        async with progress.shown(tally, by_bytes=deep):
            if repair:
                report = await repair_volume(reached.access, deep=deep, tally=tally)
            else:
                report = await check_volume(reached.access, deep=deep, settle=reached.settle, tally=tally)
        for path, domain_id in sorted(report.domains.items()):
            await add_domain(report, path, domain_id, reached)
        return report

    async def add_domain(report: Report, path: bytes, domain_id: bytes, reached: Reached) -> None:
        try:
            async with reached.domain(domain_id, path) as domain:
                report.of_domains[path] = await work(domain) if domain is not None else None
        except Damaged:
            # What is not there, or is another volume, is a finding already, or made one here.
            if not any(finding.log_id == domain_id for finding in report.damage):
                detail = "domains/ holds another volume under its id, or a damaged one"
                report.findings.append(Finding(Severity.DAMAGE, What.DOMAIN, path, "domain", detail, domain_id))
        except VolumeDamaged as error:
            report.findings.append(Finding(Severity.DAMAGE, What.DOMAIN, path, "domain", str(error), domain_id))

    return with_volume(cipher_dir, given, work, exclusive=repair)


def exit_code(report: Report) -> int:
    """0, `Damaged`'s or `Repaired`'s (docs/CLI_ABI.md)."""
    from cryptfs.errors import Damaged, Repaired

    results = {each.result for each in report.with_domains()}
    if "damaged" in results:
        return Damaged.exit_code
    return Repaired.exit_code if "repaired" in results else 0


def _show(report: Report, at: bytes = b"") -> None:
    from cryptfs.cli.progress import size

    for finding in report.findings:
        ui.out(ui.printable(f"{finding.severity.value}: {os.fsdecode(at)}{finding.line()}"))
    for path in report.busy:
        ui.note(f"{os.fsdecode(at + path)} is in use and could not be judged; unmount to check it")
    tally = report.tally
    what = "every block read" if report.deep else "structure only, --deep reads every block"
    counts = f"{tally.directories} directories, {tally.files} files, {tally.symlinks} symlinks"
    where = f"domain {ui.printable(os.fsdecode(at))}: " if at else ""
    ui.out(f"{where}{report.result}: {counts}, {size(tally.done_bytes)} in {report.duration_s:.1f} s ({what})")
    if report.damage:
        ui.out(f"{len(report.damage)} things are damaged")
    if report.leftovers:
        ui.note(f"{len(report.leftovers)} leftovers cost space and nothing else; --repair removes them")
    if report.quarantine:
        ui.note(f"what could not be put in its place is in {ui.printable(report.quarantine.decode())} in the volume")
    for path, inner in sorted(report.of_domains.items()):
        if path in report.shredded:
            continue
        if inner is None:
            ui.note(f"domain {ui.printable(os.fsdecode(at + path))}: not checked, it is locked")
        else:
            _show(inner, at + path)
