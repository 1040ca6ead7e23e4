"""An import-linter contract that lists what each package may import; whatever is not listed is forbidden.

A layers contract says what may not point upwards; this one also keeps neighbours apart, names the only user of a
third-party package, and makes a new package declare itself before it can import anything.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the list: modules in `package` may import `targets`, all below them, and the package itself."""

    package: str
    targets: frozenset[str]

    @classmethod
    def parse(cls, line: str) -> Rule:
        """`"a.b -> a.c, third_party"`; raises `ValueError` without an arrow."""
        package, arrow, targets = line.partition("->")
        if not arrow:
            msg = f"no '->' in {line!r}"
            raise ValueError(msg)
        return cls(package.strip(), frozenset(name.strip() for name in targets.split(",") if name.strip()))

    def allows(self, imported: str) -> bool:
        """Whether the rule lists `imported` or a package around it."""
        return any(is_within(imported, target) for target in (*self.targets, self.package))


def is_within(module: str, package: str) -> bool:
    """Whether `module` is `package` or lies below it."""
    return module == package or module.startswith(package + ".")


def rule_for(module: str, rules: list[Rule]) -> Rule | None:
    """The rule with the longest package name that contains `module`."""
    matching = [rule for rule in rules if is_within(module, rule.package)]
    return max(matching, key=lambda rule: len(rule.package), default=None)


def violations(graph: ImportGraph, root: str, open_to_all: set[str], rules: list[Rule]) -> list[str]:
    """Every import under `root` that no rule allows, as text; the standard library is open to all."""
    found = []
    for importer in sorted(module for module in graph.modules if is_within(module, root) and module != root):
        rule = rule_for(importer, rules)
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            if imported == root or imported.partition(".")[0] in sys.stdlib_module_names:
                continue
            if any(is_within(imported, name) for name in open_to_all) or (rule and rule.allows(imported)):
                continue
            details = graph.get_import_details(importer=importer, imported=imported)
            lines = ", ".join(str(detail["line_number"]) for detail in details)
            because = f"{rule.package} may not" if rule else "no rule for this package"
            found.append(f"{importer} -> {imported} (line {lines}): {because}")
    return found


class AllowListContract(Contract):
    """Configuration: `root` package, `open` (modules all may import), `allowed` (rules, see `Rule.parse`)."""

    type_name = "allow_list"

    root = fields.StringField()
    open = fields.SetField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: FBT001, ARG002 (import-linter's signature)
        """Called by import-linter."""
        rules = [Rule.parse(str(line)) for line in self.allowed]  # type: ignore[attr-defined]
        found = violations(graph, str(self.root), {str(name) for name in self.open}, rules)  # type: ignore[attr-defined]
        return ContractCheck(kept=not found, metadata={"violations": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Called by import-linter."""
        for line in check.metadata["violations"]:
            output.print_error(line)
