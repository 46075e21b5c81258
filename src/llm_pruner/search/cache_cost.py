"""What each unit adds to the key-value cache: measured, for no architecture is known.

From each group that is to be pruned, the smallest number of units is removed on a copy that shares
the weights, and the growth of the cache per token is counted again. Layers need not be alike, so
each is removed alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_pruner.errors import UserError
from llm_pruner.evaluation.footprint import count_work
from llm_pruner.planning import Cost, Numbering, Selection, smallest_removals
from llm_pruner.runtime.progress import track
from llm_pruner.surgery.cut import cut_copy
from llm_pruner.types import Discovery, FloatArray, Group, Removal

UNIT = "bytes of cache per token"


def cache_cost(
    model: Any,
    discovery: Discovery,
    selection: Selection,
    numbering: Numbering,
    dense: int | None = None,
) -> Cost:
    """Return the cost of the units that the selection may remove, in bytes of cache per token.

    ``dense``: bytes of the dense model; None if this is it. Raises UserError if nothing changes.
    """
    total = _bytes(model)
    if total == 0:
        raise UserError(
            "this model keeps no cache that grows with each token; give --ratio or --params"
        )
    prices: dict[str, FloatArray] = {}
    kinds: dict[str, float] = {}
    trials: list[tuple[Group, Removal]] = []
    for group, removal in smallest_removals(discovery, selection, numbering):
        alone = [{group.name: np.array([unit])} for unit in range(group.size)]
        trials += [(group, one) for one in (alone if group.modules else [removal])]
        prices[group.name] = np.zeros(group.size)
    for group, trial in track(trials, "cache of every group"):
        units = trial[group.name]
        # What goes with them is counted by its own price.
        together = sum(len(lost) for name, lost in trial.items() if name in prices)
        price = (total - _bytes(cut_copy(model, discovery, trial))) / together
        prices[group.name][units if group.modules else slice(None)] = price
        kinds[group.kind] = max(kinds.get(group.kind, 0.0), price)
    idle = [kind for kind, price in kinds.items() if price <= 0]
    if idle:
        raise UserError(
            f"{', '.join(idle)}: the cache of this model is as large without them; leave them out "
            "of the structures"
        )
    if "head_dim" in kinds and len(kinds) > 1:
        others = ", ".join(kind for kind in kinds if kind != "head_dim")
        raise UserError(
            f"--kv-cache adds up what each unit takes, and head_dim takes a part of each of "
            f"{others}; name one of them with --structures"
        )

    def left(removal: Removal) -> int:
        priced = [(prices[name], units) for name, units in removal.items() if name in prices]
        return total - round(sum(float(price[units].sum()) for price, units in priced))

    return Cost(total, left, dense or total, UNIT)


def _bytes(model: Any) -> int:
    # On a processor stand-ins do as well as weights, which may have to be read from a disk.
    on_cpu = next(model.parameters()).device.type == "cpu"
    return count_work(model, prompt_tokens=4, weights=not on_cpu).cache_bytes_per_token
