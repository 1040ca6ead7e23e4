"""What a volume says about itself, read without any key: the unauthenticated contents of its `volume` file.

Whoever can write the cipher directory can write these fields; only `unlock` and `mount`, which have the KEK, notice.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cryptfs.errors import NotAVolume, NotPermitted, StoreFailed, VolumeDamaged
from cryptfs.format.volume import FILE_MAX_BYTES, FORMAT_VERSION, Protector, Volume, is_destroyed, parse_volume
from cryptfs.ops.domains import domain_ids
from cryptfs.types import DOMAIN_SHREDDED

if TYPE_CHECKING:
    from pathlib import Path

VOLUME_FILE = "volume"


def read_volume_file(cipher_dir: Path) -> bytes:
    """The bytes of the `volume` file (FORMAT.md §3), as they are; at most 1 MiB and 48 bytes.

    Raises `NotAVolume` (no such directory or file; a domain that was shredded), `NotPermitted`, `VolumeDamaged` (too
    large), `StoreFailed` (I/O).
    """
    try:
        fd = os.open(cipher_dir / VOLUME_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise _shredded(cipher_dir) or NotAVolume(_why_not(cipher_dir)) from None
    except PermissionError:
        raise NotPermitted(f"{cipher_dir / VOLUME_FILE} may not be read by this user") from None
    except OSError as error:
        raise StoreFailed(f"{cipher_dir / VOLUME_FILE}: {error.strerror}") from error
    try:
        data = bytearray()
        while len(data) <= FILE_MAX_BYTES and (part := os.read(fd, FILE_MAX_BYTES + 1 - len(data))):
            data += part
    except OSError as error:
        raise StoreFailed(f"{cipher_dir / VOLUME_FILE}: {error.strerror}") from error
    finally:
        os.close(fd)
    if len(data) > FILE_MAX_BYTES:
        raise VolumeDamaged("the volume file is damaged: it is too long")
    if is_destroyed(bytes(data)) and (shredded := _shredded(cipher_dir)):
        raise shredded
    return bytes(data)


def _shredded(cipher_dir: Path) -> NotAVolume | None:
    """For a directory whose `volume` file is destroyed: whether it says that this was a domain, and shredded."""
    if not os.path.lexists(cipher_dir / DOMAIN_SHREDDED):
        return None
    failure = NotAVolume(f"{cipher_dir} is a domain that was shredded: nothing opens it any more")
    failure.add_note("`rmdir` of its directory in the mounted volume removes what is left of it")
    return failure


def read_volume(cipher_dir: Path) -> Volume:
    """The parsed `volume` file. Raises what `read_volume_file` and `parse_volume` raise."""
    return parse_volume(read_volume_file(cipher_dir))


def read_info(cipher_dir: Path) -> dict[str, Any]:
    """What `cryptfs info --json` prints (docs/CLI_ABI.md): ids and salts as hex, sizes in bytes, times in Unix seconds.

    Holds nothing wrapped and nothing secret. Raises what `read_volume` raises.
    """
    volume = read_volume(cipher_dir)
    return {
        "format_version": FORMAT_VERSION,
        "volume_id": volume.volume_id.hex(),
        "created_s": volume.created_s,
        "serial": volume.serial,
        "block_size": volume.block_size,
        "features": list(volume.features),
        "kek_version": volume.kek_version,
        "domains": [domain_id.hex() for domain_id in domain_ids(cipher_dir)],
        "protectors": [_protector(protector) for protector in volume.protectors],
    }


def _protector(protector: Protector) -> dict[str, Any]:
    return {
        "id": protector.protector_id.hex(),
        "kind": protector.kind,
        "label": protector.label,
        "created_s": protector.created_s,
        "params": {
            name: value.hex() if isinstance(value, bytes) else value for name, value in protector.params.items()
        },
        "kek_versions": [kek.kek_version for kek in protector.keks],
    }


def _why_not(cipher_dir: Path) -> str:
    if not cipher_dir.exists():
        return f"{cipher_dir} does not exist"
    if not cipher_dir.is_dir():
        return f"{cipher_dir} is no directory"
    return f"{cipher_dir} is not a cryptfs volume: it holds no file named `{VOLUME_FILE}`"
