"""A shred secret to be made with a volume or domain: where it will lie, from the options of `init`, `domain create`.

Crash and failure: a key file is durable before the volume is made, and taken away again if that does not come about. So
after a crash there may be a key file that nothing needs, and never a volume whose secret was not kept.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cryptfs.cli import shred_secret
from cryptfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True)
class NewShredSecret:
    """What a command line says about it: at most one place. `by_agent` is None where it was not said."""

    by_agent: bool | None
    keyfile: Path | None
    token: str | None

    def __post_init__(self) -> None:
        if self.places > 1:
            raise UsageError("--shred-secret, --shred-keyfile and --shred-token: the secret can be in one place only")
        if self.token is not None and not self.token.partition(":")[2]:
            raise UsageError(f"--shred-token takes MODULE:TOKEN, and {self.token!r} names no token")

    @property
    def places(self) -> int:
        """How many were given."""
        return bool(self.by_agent) + (self.keyfile is not None) + (self.token is not None)

    @contextlib.contextmanager
    def made(self) -> Iterator[dict[str, Any]]:
        """What a `VolumeWish` says of it. A key file made for it is removed again if the block raises.

        Asks for a token's PIN. Raises `UsageError`.
        """
        if self.token is not None:
            module, _, name = self.token.partition(":")
            wish, pin = {"module": module, "token": name}, shred_secret.ask_pin(name)
            yield {"shred_kind": shred_secret.TOKEN, "shred_params": wish, "shred_secret": pin}
            return
        if self.keyfile is None:
            yield {"shred_kind": shred_secret.AGENT} if self.by_agent else {}
            return
        path = Path(os.path.realpath(self.keyfile))
        secret = shred_secret.make(path)
        try:
            yield {"shred_kind": shred_secret.KEYFILE, "shred_params": {"path": str(path)}, "shred_secret": secret}
        except BaseException:
            shred_secret.destroy(path)
            raise


def options(command: F, *, what: str, by_default: bool) -> F:
    """Add the options to a verb that makes a `what`, which gets them as one parameter, `shred`.

    `by_default`: the agent keeps a secret unless it is kept elsewhere or ``--no-shred-secret`` says that there is none.
    """

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the verb takes
        by_agent, keyfile, token = (kwargs.pop(f"shred_{name}") for name in ("secret", "keyfile", "token"))
        if by_agent is None and by_default:
            by_agent = keyfile is None and token is None
        return command(*args, shred=NewShredSecret(by_agent, keyfile, token), **kwargs)

    text = "Make a secret that `shred` destroys; this machine keeps it."
    for option in (
        click.option(
            "--shred-token",
            metavar="MODULE:TOKEN",
            help="Keep that secret behind a new key in a PKCS#11 token: a module of agent.toml, a token's label or "
            "serial.",
        ),
        click.option(
            "--shred-keyfile",
            metavar="PATH",
            type=click.Path(path_type=Path),
            help=f"Make that secret in a new file of your own instead; without it nothing opens the {what}.",
        ),
        click.option(
            "--shred-secret/--no-shred-secret",
            default=None,
            help=f"{text}  [default: yes, unless it is kept elsewhere]",
        )
        if by_default
        else click.option("--shred-secret", is_flag=True, help=text),
    ):
        gathered = option(gathered)
    return gathered  # type: ignore[return-value]
