"""What to do about an error: the `hint:` line. The only place that turns an error's class into advice.

An error raised here on the command line may carry its own hint (`hinted`); the others get the one of their class.
"""

from __future__ import annotations

import errno
import os
from typing import TypeVar

from cryptfs import errors

E = TypeVar("E", bound=errors.CryptfsError)

_BY_CLASS: dict[type[errors.CryptfsError], str] = {
    errors.NotAVolume: "`cryptfs init DIR` makes a volume",
    errors.VolumeDamaged: "put back the files `volume` and `state` from a backup of this same volume",
    errors.RolledBack: "restored from a backup, or a second copy? `cryptfs check DIR --accept-all` takes it as it is",
    errors.FreshnessUnavailable: "if the record is lost, move it away: the volume is then trusted as it is, once",
    errors.UnsupportedFormat: "a newer cryptfs wrote this volume; use that version",
    errors.WrongSecret: "check the keyboard layout and the caps lock key",
    errors.VolumeBusy: "`cryptfs status` shows where it is mounted",
    errors.AgentUnavailable: "start one with `cryptfs agent run`, then `cryptfs unlock DIR`",
    errors.VolumeLocked: "`cryptfs unlock DIR` brings the key back",
    errors.StoreFailed: "see whether the file system that holds the volume is full, read-only or failing",
    errors.BackendUnavailable: "is the token plugged in? After a change of agent.toml: `cryptfs agent stop`",
    errors.AuditUnavailable: "make room, or make it writable again: what must be on the record then works again",
    errors.NotPermitted: "run cryptfs as the user who owns the volume and the agent",
    errors.ProtocolError: "agent and command may be of different versions; `cryptfs agent stop` ends the old agent",
}


_BY_TEXT: dict[str, str] = {
    # `fs.epoch`, whichever way.
    "the volume's `state` ": "`cryptfs check DIR --repair` makes it anew from the rest of the volume",
    # What the agent says of a directory of its own (`agent.places`): no room there would help.
    "lies in the cryptfs mount": "have XDG_STATE_HOME name a directory outside of every cryptfs mount; then "
    "`cryptfs agent stop`",
    # `agent.shred_store`.
    "cannot be kept": "make room in the key agent's state directory, or make it writable",
    # `agent.listen`, `paths.private_dir`: nobody else need be in it.
    "is no socket; it is left alone": "move it away, then try again",
    "is open to other users": "`chmod 700` takes the others' rights away, if what lies there is yours",
    # `plain_agent.stranger`.
    "not as a key agent does": "end that process, then try again: an agent is started as needed",
}
"""Where the class says too little."""


def hinted(error: E, hint: str) -> E:
    """`error`, carrying a hint of its own."""
    error.add_note(hint)
    return error


def hint_for(error: errors.CryptfsError) -> str:
    """The advice for `error`, or nothing."""
    own: list[str] = getattr(error, "__notes__", [])
    if own:
        return own[0]
    if isinstance(error, errors.StoreFailed) and os.strerror(errno.ENOENT) in str(error):
        return "make the directory that it is to lie in first"
    if isinstance(error, errors.StoreFailed) and os.strerror(errno.EACCES) in str(error):
        return _BY_CLASS[errors.NotPermitted]
    for text, hint in _BY_TEXT.items():
        if text in str(error):
            return hint
    if isinstance(error, errors.AgentUnavailable) and error.silent_pid:
        pid = error.silent_pid
        return f"`kill -CONT {pid}` has it go on if it was stopped; `kill -9 {pid}` ends it, and mounts lock themselves"
    return next((_BY_CLASS[cls] for cls in type(error).__mro__ if cls in _BY_CLASS), "")


def error_for(exit_code: int, message: str) -> errors.CryptfsError:
    """The error whose class has `exit_code`: how a failure in another process becomes one here."""
    for cls in _all_classes(errors.CryptfsError):
        if cls.exit_code == exit_code:
            return errors.Damaged(message) if issubclass(cls, errors.Damaged) else cls(message)
    return errors.CryptfsError(message)


def _all_classes(base: type[errors.CryptfsError]) -> list[type[errors.CryptfsError]]:
    return [base, *(cls for child in base.__subclasses__() for cls in _all_classes(child))]
