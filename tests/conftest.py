"""Prints what the twin test measured, one line per model family."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the largest difference between pruned models and their masked twins.

    Reads the property ``twin`` of tests, (family, kind, difference): properties reach the main
    process when tests run in several.
    """
    table: dict[str, dict[str, float]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "twin":
                    family, kind, difference = value
                    kinds = table.setdefault(family, {})
                    kinds[kind] = max(kinds.get(kind, 0.0), difference)
    if not table:
        return
    terminalreporter.section("pruned model against masked twin: largest difference of logits")
    width = max(len(family) for family in table)
    for family in sorted(table):
        kinds = table[family]
        parts = "  ".join(f"{kind} {difference:.0e}" for kind, difference in kinds.items())
        terminalreporter.write_line(f"{family:{width}}  max {max(kinds.values()):.1e}  {parts}")
