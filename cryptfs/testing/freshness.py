"""What a machine has seen of a volume, kept in a dict: it outlives openings and stores, like the agent's database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptfs.errors import CryptfsError, RolledBack
from cryptfs.types import DELETED


class FakeRecord:
    """One machine's record of one volume. A new one has never seen it.

    Set `failure` to have every call end with it.
    """

    def __init__(self) -> None:
        self.failure: CryptfsError | None = None
        self.floors: dict[bytes, int] = {}
        self.state_sequence = 0

    def clone(self) -> FakeRecord:
        """What another history of the same volume goes on from."""
        other = FakeRecord()
        other.floors = dict(self.floors)
        other.state_sequence = self.state_sequence
        return other

    def floor(self, log_id: bytes) -> int:
        return self.floors.get(log_id, 0)

    def begin(self, state_sequence: int) -> bool:
        self._fail()
        if state_sequence < self.state_sequence:
            raise RolledBack("an older state of the volume than this machine has seen")
        return self.state_sequence == 0

    def record(self, logs: Mapping[bytes, int], gone: Sequence[bytes], state_sequence: int | None) -> None:
        self._fail()
        for log_id, generation in logs.items():
            if self.floor(log_id) != DELETED:
                self.floors[log_id] = max(self.floor(log_id), generation)
        for log_id in gone:
            if log_id in self.floors:
                self.floors[log_id] = DELETED
        self.state_sequence = max(self.state_sequence, state_sequence or 0)

    def accept(self, logs: Mapping[bytes, int]) -> None:
        self._fail()
        self.floors.update(logs)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure
