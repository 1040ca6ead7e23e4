"""The agent's configuration, `$XDG_CONFIG_HOME/cryptfs/agent.toml`: what this machine has that a root key can be in.

    [pkcs11]
    writable = ["/home/me/.local/share/softhsm"]           # directories the modules write to
    network = false                                        # whether they need sockets other than Unix ones
    environment = { SOFTHSM2_CONF = "/home/me/softhsm2.conf" }

    [pkcs11.modules]
    softhsm = "/usr/lib/softhsm/libsofthsm2.so"

A `volume` file says `softhsm` and never a path: whoever edits it could otherwise name any library for the process that
holds the KEKs to load. So this file decides what code runs there, and must be nobody's to write but the user's (or
root's), and so must the libraries it names. No file at all is fine: nothing is configured then.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptfs.errors import NotPermitted, UsageError

FILE_NAME = "agent.toml"
FILE_MAX_BYTES = 64 << 10
MODULE_NAME_MAX_CHARS = 64


@dataclass(frozen=True, slots=True)
class Pkcs11Config:
    """PKCS#11 modules (absolute paths by name) and what the agent's confinement leaves them."""

    modules: Mapping[str, str] = field(default_factory=dict)
    writable: tuple[str, ...] = ()
    network: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What `agent.toml` says."""

    pkcs11: Pkcs11Config = field(default_factory=Pkcs11Config)


def read_config(config_dir: str) -> AgentConfig:
    """The configuration in the file `agent.toml` of a directory; the defaults if there is none.

    Raises `NotPermitted` if others may write it or a library that it names, `UsageError` for anything wrong in it.
    """
    path = os.path.join(config_dir, FILE_NAME)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except FileNotFoundError:
        return AgentConfig()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is no regular file")
        _check_ours(path, status)
        data = os.read(fd, FILE_MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > FILE_MAX_BYTES:
        raise UsageError(f"{path} is longer than {FILE_MAX_BYTES} bytes")
    try:
        document = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    return AgentConfig(_Reader(path).pkcs11(document))


class _Reader:
    """Takes the document apart; every message names the file and the place in it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def pkcs11(self, document: Mapping[str, object]) -> Pkcs11Config:
        self._only(document, "pkcs11", where="the file")
        if "pkcs11" not in document:
            return Pkcs11Config()
        table = self._table(document["pkcs11"], "pkcs11")
        self._only(table, "modules", "writable", "network", "environment", where="[pkcs11]")
        network = table.get("network", False)
        if type(network) is not bool:
            raise self._error("pkcs11.network is not true or false")
        return Pkcs11Config(
            modules=self._modules(self._texts(table.get("modules", {}), "pkcs11.modules")),
            writable=self._directories(table.get("writable", []), "pkcs11.writable"),
            network=network,
            environment=self._environment(self._texts(table.get("environment", {}), "pkcs11.environment")),
        )

    def _modules(self, modules: Mapping[str, str]) -> Mapping[str, str]:
        for name, path in modules.items():
            if not 1 <= len(name) <= MODULE_NAME_MAX_CHARS:
                raise self._error(f"a module's name has 1 to {MODULE_NAME_MAX_CHARS} characters")
            if not os.path.isabs(path):
                raise self._error(f"the path of the module {name!r} is not absolute")
            real = os.path.realpath(path)
            # Its directory, too: who may write there may put another file in the library's place.
            for each in (real, os.path.dirname(real)):
                try:
                    status = os.stat(each)
                except OSError as error:
                    raise self._error(f"the module {name!r}: {each}: {error.strerror}") from error
                _check_ours(each, status)
            if not os.path.isfile(real):
                raise self._error(f"the module {name!r}: {path} is no file")
        return modules

    def _directories(self, value: object, where: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
            raise self._error(f"{where} is no list of texts")
        for path in value:
            if not os.path.isabs(path) or not os.path.isdir(path):
                raise self._error(f"{where}: {path!r} is not the absolute path of a directory that exists")
        return tuple(value)

    def _environment(self, variables: Mapping[str, str]) -> Mapping[str, str]:
        for name, value in variables.items():
            if not name or "=" in name or "\0" in name + value:
                raise self._error(f"pkcs11.environment: {name!r} cannot be set")
        return variables

    def _texts(self, value: object, where: str) -> Mapping[str, str]:
        table = self._table(value, where)
        texts = {name: text for name, text in table.items() if isinstance(text, str)}
        if len(texts) != len(table):
            raise self._error(f"{where} has a value that is no text")
        return texts

    def _table(self, value: object, where: str) -> Mapping[str, object]:
        if not isinstance(value, dict):
            raise self._error(f"{where} is no table")
        return value

    def _only(self, table: Mapping[str, object], *names: str, where: str) -> None:
        unknown = sorted(table.keys() - set(names))
        if unknown:
            raise self._error(f"{where} has {unknown[0]!r}, which means nothing here")

    def _error(self, what: str) -> UsageError:
        return UsageError(f"{self._path}: {what}")


def _check_ours(path: str, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise NotPermitted(f"{path} belongs to another user (uid {status.st_uid})")
    if status.st_mode & 0o022:
        raise NotPermitted(f"other users may write to {path} (mode {stat.S_IMODE(status.st_mode):04o})")
