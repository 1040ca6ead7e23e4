"""The `cryptfs` command: finds the verb, runs it, and turns whatever comes out of it into an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from cryptfs import __version__
from cryptfs.cli import passphrase, shred_secret, ui
from cryptfs.errors import CryptfsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

EXIT_USAGE = 2
EXIT_INTERNAL = 70
"""A fault of our own: EX_SOFTWARE of sysexits(3)."""
EXIT_SIGNAL = 128
EXIT_INTERRUPTED = EXIT_SIGNAL + signal.SIGINT

_BARE_GROUP: tuple[type[click.UsageError], ...] = tuple(
    filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)])
)
"""A verb is missing: the message is the whole help. (Before 8.2, click shows it by itself.)"""

_VERBS = {
    "init": "cryptfs.cli.init:init",
    "mount": "cryptfs.cli.mount:mount",
    "umount": "cryptfs.cli.umount:umount",
    "unlock": "cryptfs.cli.unlock:unlock",
    "lock": "cryptfs.cli.lock:lock",
    "status": "cryptfs.cli.status:status",
    "policy": "cryptfs.cli.policy:policy",
    "info": "cryptfs.cli.info:info",
    "protector": "cryptfs.cli.protector:protector",
    "domain": "cryptfs.cli.domain:domain",
    "check": "cryptfs.cli.check:check",
    "export": "cryptfs.cli.export:export",
    "rotate": "cryptfs.cli.rotate:rotate",
    "shred": "cryptfs.cli.shred:shred",
    "audit": "cryptfs.cli.audit:audit",
    "agent": "cryptfs.cli.agent_verbs:agent",
}


class Verbs(click.Group):
    """A group whose verbs are imported when they are called."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """The verbs, in the order a new user meets them."""
        return list(_VERBS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of that name, or None."""
        if cmd_name not in _VERBS:
            return None
        module, name = _VERBS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="cryptfs %(version)s")
@click.option("--debug", is_flag=True, help="Show a stack trace for every failure.")
def cli(*, debug: bool) -> None:
    """An encrypted directory in which every block has its own key and every key can be replaced."""
    del debug  # `main` looks for it itself: it must work for failures before and while click parses


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv); returns the exit code. Never raises."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    code = 0
    try:
        passphrase.claim_environment()
        shred_secret.claim_environment()
        with _termination_raises():
            result = cli.main(words, prog_name="cryptfs", standalone_mode=False)
            sys.stdout.flush()
            code = result if isinstance(result, int) else 0
    except BaseException as failure:  # noqa: BLE001  this is where every failure of the program ends
        if "--debug" in _global_options(words) and not isinstance(failure, SystemExit | click.ClickException):
            import traceback

            traceback.print_exception(failure)
        return _report(_single(failure))
    return code


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM and SIGHUP leave through `finally`, so that nothing half made and no silent terminal stays behind."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(EXIT_SIGNAL + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _global_options(words: list[str]) -> list[str]:
    """The options before the verb."""
    return words[: next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))]


def _single(failure: BaseException) -> BaseException:
    """The one error inside a group: trio wraps what leaves a nursery (trio.NurseryCancelled aside, PEP 654)."""
    while isinstance(failure, BaseExceptionGroup):
        ours = [
            inner
            for inner in failure.exceptions
            if isinstance(inner, CryptfsError | KeyboardInterrupt | BaseExceptionGroup)
        ]
        failure = (ours or failure.exceptions)[0]
    return failure


def _report(failure: BaseException) -> int:
    """Say what went wrong; the exit code for it."""
    if isinstance(failure, CryptfsError):
        from cryptfs.cli.advice import hint_for

        ui.error(str(failure), hint_for(failure))
        return failure.exit_code
    if isinstance(failure, _BARE_GROUP):
        sys.stderr.write(f"{failure.format_message()}\n")
        return EXIT_USAGE
    if isinstance(failure, click.ClickException):
        usage = failure.ctx.command_path if isinstance(failure, click.UsageError) and failure.ctx else "cryptfs"
        ui.error(failure.format_message(), f"`{usage} --help` lists what it takes")
        return EXIT_USAGE
    if isinstance(failure, KeyboardInterrupt | click.Abort):
        ui.error("interrupted")
        return EXIT_INTERRUPTED
    if isinstance(failure, SystemExit):
        return failure.code if isinstance(failure.code, int) else int(failure.code is not None)
    if isinstance(failure, BrokenPipeError):
        _silence_stdout()
        return 1
    if isinstance(failure, OSError) and failure.strerror:
        from cryptfs.errors import StoreFailed

        name = f"{os.fsdecode(failure.filename)}: " if isinstance(failure.filename, str | bytes) else ""
        return _report(StoreFailed(f"{name}{failure.strerror}"))
    # The message of an error that nobody foresaw might hold anything, so only its kind and place are shown.
    ui.error(
        f"internal error: {type(failure).__name__} {_place(failure)}",
        "run it again as `cryptfs --debug ...` and report what it shows",
    )
    return EXIT_INTERNAL


def _place(failure: BaseException) -> str:
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else ""


def _silence_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes a stdout that nobody reads (Python docs, SIGPIPE)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
