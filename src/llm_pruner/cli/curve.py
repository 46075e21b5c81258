"""``llm-pruner curve``: damage against size, with a plan for each point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_pruner.cli.output import (
    Screen,
    command_line,
    hand_over,
    tell_going_on,
    tell_stage,
    telling_how_to_go_on,
    warn,
)
from llm_pruner.report.text import clean
from llm_pruner.runtime.memory import PRUNING, keep_kernels
from llm_pruner.settings.curve import CurveSettings

if TYPE_CHECKING:
    from llm_pruner.report.records import Curve

EXAMPLES = """\b
Examples:
  llm-pruner curve default --out sizes --calibration c4
  llm-pruner curve ./llama --out sizes --preset balanced --ratios 0.1,0.2,0.3
  llm-pruner curve ./llama --out sizes --max-damage 1.2x
"""


def run(settings: CurveSettings, json: str | None) -> None:
    """Measure the damage at several sizes, with a plan for each.

    An interrupted run goes on when the same command is given again.
    """
    keep_kernels(PRUNING)
    from llm_pruner.commands.curve import curve
    from llm_pruner.commands.workdir import MEASURING

    with telling_how_to_go_on(MEASURING, settings.out, restart=settings.restart):
        done = curve(settings, command=command_line(), tell=tell_stage, going_on=tell_going_on)
    for share, why in done.missed.items():
        warn(f"no point at {share}: {why}")
    hand_over(done, json, show)


def show(done: Curve) -> None:
    """Print the points, and how small the model may be."""
    from llm_pruner.report.curve import COLUMNS, answer, cells, on

    out = Screen()
    rows = [cells(point)[:-1] for point in done.points]  # the plan is named by the size
    out.table("Damage against size", COLUMNS[:-1], rows)
    out.print(f"measured on {clean(on(done.points))}", soft_wrap=True)
    if said := answer(done):
        out.print(said)
    out.print(f"a plan for each size is there, such as {done.points[0].plan}", soft_wrap=True)
    out.places(done.path, done.report)
