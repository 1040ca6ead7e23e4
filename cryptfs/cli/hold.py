"""Having a volume unlocked for one command, killed or not: the agent locks it when this connection ends.

A volume that was unlocked before stays so; one that other commands have unlocked stays until the last of them is done.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Self

from cryptfs.cli import agent_process, plain_agent
from cryptfs.cli.plain_agent import Connection, NotReached
from cryptfs.errors import AgentUnavailable, CryptfsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType


class Hold:
    """A connection to the agent that volumes are held for; `close` lets go of them. Made in any state of the agent."""

    def __init__(self) -> None:
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        """The hold, which holds nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of everything; who asks the agent from now on finds it locked only some moments later."""
        self.close()

    def join(self, volume_id: bytes) -> bool:
        """Have a volume that is unlocked stay so while we are connected; whether it is unlocked.

        False if no agent runs, or one ends. Raises `AgentUnavailable`, `NotPermitted`.
        """
        if not agent_process.is_running():
            return False
        try:
            connection = Connection()
        except NotReached:
            return False
        unlocked = False
        try:
            args = {"volume_id": volume_id, "while_connected": True}
            unlocked = connection.request("hold", args, get_was_unlocked, patience_s=plain_agent.PATIENCE_S)
        except AgentUnavailable as error:
            if error.silent_pid:
                raise
            # It was ending just then, and has locked everything.
        finally:
            if unlocked:
                self._keep(connection)
            else:
                connection.close()
        return unlocked

    def unlock(self, args: Mapping[str, Any], *, patience_s: float) -> None:
        """The request `unlock`, made once; `args` say `while_connected`. Raises as `plain_agent.tell`."""
        from cryptfs.keys.agent_answers import get_unlocked

        connection = Connection()
        try:
            connection.request("unlock", args, get_unlocked, patience_s=patience_s)
        except BaseException:
            connection.close()
            raise
        self._keep(connection)

    def release(self, volume_id: bytes) -> None:
        """The volume is not needed any more; if it is to be locked now, it is when this returns."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        # An agent that is gone has locked it.
        with contextlib.closing(connection), contextlib.suppress(CryptfsError):
            connection.request("release", {"volume_id": volume_id}, _nothing, patience_s=plain_agent.PATIENCE_S)

    def close(self) -> None:
        """End the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _keep(self, connection: Connection) -> None:
        self.close()
        self._connection = connection


def get_was_unlocked(result: Mapping[str, Any]) -> bool:
    """What `hold` was answered. Raises `ProtocolError`."""
    from cryptfs.keys.agent_answers import get_bool

    return get_bool(result, "was_unlocked")


def _nothing(_result: Mapping[str, Any]) -> None:
    return
