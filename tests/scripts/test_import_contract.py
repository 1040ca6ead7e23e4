from __future__ import annotations

import pytest
from grimp import ImportGraph

from scripts.import_contract import Rule, rule_for, violations

RULES = [
    Rule.parse("app.top -> app.low, thirdparty"),
    Rule.parse("app.top.__main__ -> app.top, app.side"),
    Rule.parse("app.low ->"),
]


def found(*imports: tuple[str, str]) -> list[str]:
    graph = ImportGraph()
    for importer, imported in imports:
        graph.add_import(importer=importer, imported=imported, line_number=1, line_contents="")
    return [text.split(" (")[0] for text in violations(graph, "app", {"app.errors"}, RULES)]


def test_listed_packages_their_insides_the_own_package_and_the_open_ones_are_allowed() -> None:
    assert found(
        ("app.top.a", "app.low.deep.inside"),
        ("app.top.a", "app.top.b"),
        ("app.top.a", "thirdparty.sub"),
        ("app.low", "app.errors"),
        ("app.low", "os"),
        ("app.low", "app"),
    ) == []  # fmt: skip


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("app.low", "app.top"),
        ("app.low", "thirdparty"),
        ("app.top", "app.lower"),
        ("app.top.a", "app.side"),
        ("app.new", "app.low"),
    ],
)
def test_everything_else_is_forbidden(importer: str, imported: str) -> None:
    assert found((importer, imported)) == [f"{importer} -> {imported}"]


def test_the_longest_rule_wins() -> None:
    assert rule_for("app.top.__main__", RULES) is RULES[1]
    assert found(("app.top.__main__", "app.side")) == []
    assert found(("app.top.__main__", "thirdparty")) == ["app.top.__main__ -> thirdparty"]


def test_a_rule_without_an_arrow_is_refused() -> None:
    with pytest.raises(ValueError, match="->"):
        Rule.parse("app.low")
