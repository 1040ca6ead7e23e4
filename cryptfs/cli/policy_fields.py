"""A policy's fields as the command line shows them, for `policy` and `status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptfs.format.policy import Policy
    from cryptfs.keys.agent_answers import Report

LABELS = {
    "caching": "cache",
    "max_age_s": "max age",
    "max_entries": "max entries",
    "max_uses": "max uses",
    "idle_s": "locked when idle for",
    "for_s": "locked after",
    "reverify_s": "reverify every",
    "unwraps_per_s": "unwraps per second",
}


def effective(policy: Policy, report: Report | None = None) -> dict[str, bool | float | None]:
    """Every field as it holds; of a mount with a report, as its daemon obeys it. None: no limit."""
    from cryptfs.format.policy import REVERIFY_DEFAULT_S
    from cryptfs.keys.policy import Overrides

    obeyed = Overrides().over(policy)
    fields: dict[str, bool | float | None] = {
        "caching": obeyed.caching, "max_age_s": obeyed.max_age_s, "max_entries": obeyed.max_entries,
        "max_uses": obeyed.max_uses, "idle_s": policy.idle_s, "for_s": policy.for_s,
        "reverify_s": REVERIFY_DEFAULT_S if policy.reverify_s is None else policy.reverify_s,
        "unwraps_per_s": policy.unwraps_per_s,
    }  # fmt: skip
    if report is not None:
        told = report.policy
        fields |= {"caching": bool(told["caching"]), "max_age_s": (told["max_age_ms"] or 0) / 1000,
                   "max_entries": told["max_entries"], "max_uses": told["max_uses"]}  # fmt: skip
    return fields


def shown(name: str, value: bool | float | None) -> str:
    """A field's value for people."""
    if name == "caching":
        return "on" if value else "off"
    if value is None:
        return "no limit"
    return f"{value:g} s" if name.endswith("_s") and name != "unwraps_per_s" else f"{value:g}"
