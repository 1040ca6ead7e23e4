"""`cryptfs agent run|stop`: the key agent by hand; `mount` and `unlock` start one by themselves."""

from __future__ import annotations

import click

from cryptfs.cli import ui

STOP_S = 10.0


@click.group()
def agent() -> None:
    """Run or stop the process that holds this user's keys."""


@agent.command()
@click.option("-f", "--foreground", is_flag=True, help="Stay until it ends; Ctrl-C or SIGTERM ends it.")
def run(*, foreground: bool) -> int:
    """Run an agent that stays when it holds no key any more."""
    from cryptfs.cli import agent_process

    if foreground:
        return agent_process.run_foreground()
    pid = agent_process.run_background()
    ui.done(f"the key agent runs as process {pid}")
    return 0


@agent.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
def status(*, as_json: bool) -> None:
    """Show what protects the agent's process here, and whether its audit log can be written."""
    from cryptfs.cli import key_agent
    from cryptfs.errors import AgentUnavailable

    about = key_agent.about()
    if about is None:
        raise AgentUnavailable("no agent runs")
    if as_json:
        ui.out_json({"pid": about.pid, "hardening": dict(about.hardening), "audit_trouble": about.audit_trouble})
        return
    ui.table(["measure", "state"], [[name.replace("_", " "), state] for name, state in about.hardening.items()])
    if about.audit_trouble is not None:
        ui.warning(about.audit_trouble)


@agent.command()
def stop() -> None:
    """Make the agent forget every key and end. Mounts stay; what needs a key fails there until `cryptfs unlock`."""
    from cryptfs.cli import agent_process, key_agent, processes
    from cryptfs.cli.advice import hinted
    from cryptfs.errors import AgentUnavailable

    if not agent_process.is_running():
        ui.note("no agent runs")
        return
    pid = key_agent.pid()
    with processes.watched(pid) as watch:
        for volume in key_agent.held():
            if volume.mountpoint:
                ui.warning(f"{volume.mountpoint} stays mounted without a key")
        key_agent.stop()
        if not watch.has_ended(STOP_S):
            slow = AgentUnavailable(f"the agent (process {pid}) forgot every key but has not ended")
            raise hinted(slow, f"kill {pid}")
