"""Every error cryptfs raises on purpose, and the exit code a command ends with for it.

    CryptfsError                    1   anything not listed below
    +-- UsageError                  2   arguments that make no sense together
    +-- NotAVolume                 10   the directory holds no cryptfs volume
    +-- VolumeDamaged              11   `volume` or `state` was edited, torn or replaced
    +-- UnsupportedFormat          12   a newer format version or an unknown feature
    +-- WrongSecret                13   no protector opens with the secret given
    +-- VolumeBusy                 14   the volume is mounted (or being changed) already
    +-- MountpointUnusable         15   missing, not empty, busy, or not a mount of ours
    +-- AgentUnavailable           16   no agent, it died in mid-request, hangs, or sent rubbish
    +-- VolumeLocked               17   the agent does not hold this volume's KEK
    +-- MissingDependency          18   /dev/fuse, fusermount3 or a library is missing
    +-- StoreFailed                19   the backing store said no (full, read-only, I/O error)
    +-- NotPermitted               20   another user's agent, socket or volume
    +-- Damaged                    21   one entry, file or block is not what was written (EIO on it alone)
    +-- ProtocolError              22   a message that breaks the agent protocol
    +-- Denied                     23   a policy of the agent, or a root key's holder, refuses
    +-- Repaired                   24   damage was found and put right: `check --repair` ends with it, nothing raises it
    +-- (VolumeDamaged) RolledBack 25   an older state of the volume than this machine has seen
    +-- FreshnessUnavailable       26   the record of what this machine has seen cannot be read or written
    +-- AuditUnavailable           27   the audit log cannot be read or written, so what must be on it is refused
    +-- AuditDamaged               28   the audit log was changed: lines edited, removed, reordered, or files missing
    +-- ShredSecretMissing         29   the volume's shred secret is not where it should be, or is another one
    +-- BackendUnavailable         30   a root key's holder (token, module, service) cannot be reached

The numbers are part of the command line's contract (docs/CLI_ABI.md): never reused, never renumbered. This module
imports nothing; only `cli` turns an error into advice, only `fuse` into an errno.
"""


class CryptfsError(Exception):
    """Base of all errors raised on purpose; the text is safe to show and to log (it never holds a secret)."""

    exit_code = 1


class UsageError(CryptfsError):
    """Arguments that make no sense together."""

    exit_code = 2


class NotAVolume(CryptfsError):
    """The directory holds no cryptfs volume."""

    exit_code = 10


class VolumeDamaged(CryptfsError):
    """`volume` or `state` was edited, torn or replaced: nothing in the volume is served."""

    exit_code = 11


class UnsupportedFormat(CryptfsError):
    """A newer format version or a feature this program does not know."""

    exit_code = 12


class WrongSecret(CryptfsError):
    """No protector opens with the secret given."""

    exit_code = 13


class VolumeBusy(CryptfsError):
    """Another process holds the volume's lock."""

    exit_code = 14


class MountpointUnusable(CryptfsError):
    """The mount point is missing, not empty, busy, or no mount of ours."""

    exit_code = 15


class AgentUnavailable(CryptfsError):
    """The key agent is not there, died in mid-request, hangs, or sent rubbish.

    `silent_pid`: the process that is there and does not answer; 0: there is none.
    """

    exit_code = 16
    silent_pid = 0


class VolumeLocked(CryptfsError):
    """The agent does not hold this volume's KEK."""

    exit_code = 17


class MissingDependency(CryptfsError):
    """Something the machine must provide is missing; the text says what to install."""

    exit_code = 18


class StoreFailed(CryptfsError):
    """The backing store refused: full, read-only or failing."""

    exit_code = 19


class NotPermitted(CryptfsError):
    """The socket, agent or volume belongs to another user."""

    exit_code = 20


class Damaged(CryptfsError):
    """One entry, file or block is not what was written; everything else is unaffected.

    `reason` is a short word for logs and tests, for example ``tag``, ``missing-sidecar``, ``id-mismatch``.
    """

    exit_code = 21

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class ProtocolError(CryptfsError):
    """A message that breaks the agent protocol."""

    exit_code = 22


class Denied(CryptfsError):
    """A policy of the agent refuses the request, or the holder of a root key does: key gone, PIN locked."""

    exit_code = 23


class Repaired(CryptfsError):
    """Damage or leftovers were found and put right. Never raised: `check --repair` ends with its code."""

    exit_code = 24


class RolledBack(VolumeDamaged):
    """All of the volume, or its `volume` or `state`, is older than this machine has seen: nothing is served."""

    exit_code = 25


class FreshnessUnavailable(CryptfsError):
    """The record of what this machine has seen of the volume is damaged, in use, or cannot be written."""

    exit_code = 26


class AuditUnavailable(CryptfsError):
    """The audit log cannot be read or written: what must be on the record is refused until it can."""

    exit_code = 27


class AuditDamaged(CryptfsError):
    """The audit log is not what was written: lines were edited, removed or reordered, or files are missing."""

    exit_code = 28


class ShredSecretMissing(CryptfsError):
    """The secret that the volume's KEKs need besides a protector is gone, not given, or another volume's."""

    exit_code = 29


class BackendUnavailable(CryptfsError):
    """What holds a root key cannot be reached now: a token that is not plugged in, a module that does not load."""

    exit_code = 30
