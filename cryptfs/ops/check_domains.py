"""A check's view of domains: every place has its volume in `domains/`, and what lies there besides (FORMAT.md §6).

What is in a domain is that volume's own check.
"""

from __future__ import annotations

import os

from cryptfs.errors import Damaged
from cryptfs.fs.context import FsContext
from cryptfs.fs.domain import ASIDE, DOMAINS, SHREDDED, domains_fd, find_name, id_in_name, is_shredded_at
from cryptfs.fs.reaper import remove_tree
from cryptfs.names import DIR_LOG, DIR_LOG_NEW
from cryptfs.ops.check_report import SHREDDED as REASON_SHREDDED
from cryptfs.ops.check_report import Finding, Severity, What


def placed(ctx: FsContext, places: dict[bytes, bytes]) -> list[Finding]:
    """Places (path → domain's id) whose volume is not there, or was shredded. Raises OSError."""
    out = []
    for path, domain_id in places.items():
        try:
            name = find_name(ctx, domain_id)
        except Damaged as error:
            out.append(Finding(Severity.DAMAGE, What.DOMAIN, path, error.reason, str(error), domain_id))
            continue
        if is_shredded_at(ctx, name):
            detail = "by its owner: nothing in it can be read any more; `rmdir` of it in the mount removes it"
            out.append(Finding(Severity.NOTICE, What.DOMAIN, path, REASON_SHREDDED, detail, domain_id))
    return out


def unnamed(ctx: FsContext, places: dict[bytes, bytes], *, all_seen: bool) -> list[Finding]:
    """What lies in `domains/` and belongs to no place. `all_seen`: every directory was; else nothing is a leftover.

    Raises OSError.
    """
    try:
        names = ctx.store.listdir(domains_fd(ctx))
    except FileNotFoundError:
        return []
    except Damaged as error:
        return [Finding(Severity.DAMAGE, What.DOMAIN, DOMAINS, error.reason, str(error))]
    wanted = set()
    for named in places.values():
        try:
            wanted.add(find_name(ctx, named))
        except Damaged:
            continue
    out = []
    for name in sorted(set(names) - wanted):
        path, domain_id = DOMAINS + b"/" + name, id_in_name(name)
        if domain_id is None:
            out.append(Finding(Severity.NOTICE, What.FOREIGN, path, "foreign", "not a domain's name"))
        elif name.endswith(ASIDE) and all_seen and (_is_empty(ctx, name) or is_shredded_at(ctx, name)):
            detail = "a domain that was being made or removed"
            out.append(Finding(Severity.LEFTOVER, What.UNFINISHED, path, "domain", detail, domain_id))
        else:
            detail = "no directory is its place; it can be mounted by itself"
            out.append(Finding(Severity.NOTICE, What.DOMAIN, path, "unnamed", detail, domain_id))
    return out


def _is_empty(ctx: FsContext, name: bytes) -> bool:
    """Whether a domain holds nothing, as while it is made and when it was removed. Another is never a leftover."""
    try:
        fd = ctx.store.open(domains_fd(ctx), name, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        tree = ctx.store.open(fd, b"tree", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return set(ctx.store.listdir(tree)) <= {DIR_LOG, DIR_LOG_NEW}
        finally:
            ctx.store.close(tree)
    except FileNotFoundError:
        return b"volume" not in ctx.store.listdir(fd)
    except OSError:
        return False
    finally:
        ctx.store.close(fd)


def remove(ctx: FsContext, path: bytes) -> bool:
    """Delete a leftover; whether it is gone. Blocks. Raises OSError."""
    name = path.removeprefix(DOMAINS + b"/")
    remove_tree(ctx.store, domains_fd(ctx), name, SHREDDED)
    return name not in ctx.store.listdir(domains_fd(ctx))
