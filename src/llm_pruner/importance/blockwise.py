"""Taylor sums block by block: no more than one block's weight gradients at a time.

One forward pass keeps the hidden states at the borders between blocks and yields the gradient of
the loss at the last border. Then, from the last block to the first, each block is run again on its
stored input and the gradient is pulled back through it; its weight gradients are summed over the
samples in float32, multiplied by the weights, reduced to one vector per axis, and forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llm_pruner.importance.boundary_pass import forward, hidden_form, parts_of, store_slope
from llm_pruner.importance.criterion import Criterion
from llm_pruner.importance.gradients import GradientSums, loss_cotangent, pull_back
from llm_pruner.importance.needs import Need, Sums, parameters_by_name
from llm_pruner.models.blockwise import Borders, Call, Chain, find_chain, hidden_of
from llm_pruner.runtime.progress import track

_BUDGET = 2**26
"""Bytes of hidden states and their gradients held in memory; the rest goes to files."""


def blockwise_sums(
    model: nn.Module,
    input_ids: torch.Tensor,
    criterion: Criterion,
    needs: Mapping[str, Need],
    budget: int = _BUDGET,
) -> dict[str, Sums]:
    """Return the criterion's sums for every tensor of ``needs``.

    Args:
        model: with no parameter that requires a gradient.
        input_ids: shape (samples, seq_len), on the model's device.
        criterion: a taylor criterion.
        needs: tensor -> sums wanted.
        budget: bytes of hidden states held in memory.

    Raises:
        NotBlockwise: the model is not a chain of blocks.
        UserError: see ``score``.
    """
    known = parameters_by_name(model)
    chain = find_chain(model, input_ids, {name: known[name] for name in needs})
    count, samples = len(chain.blocks), len(input_ids)
    with_weights = [index for index, owned in enumerate(chain.owned) if owned]
    lowest = 0 if chain.bottom else min(with_weights, default=count)
    wanted = range(lowest, count + 1 if chain.outside else count)

    first = criterion.order == "first"
    together, headed = parts_of(chain, input_ids, first)

    with chain.opened():
        shape, dtype = hidden_form(chain, input_ids)
        shape = (samples, *shape)
        slope_type = torch.promote_types(dtype, torch.float32)
        with (
            Borders(range(1), shape, slope_type, budget) as slopes,
            Borders(wanted, shape, dtype, max(0, budget - slopes.resident)) as borders,
        ):
            for part in track(headed, "importance: forward"):
                forward(chain, input_ids, part, borders, slopes, wanted)
            found = _through_blocks(
                chain, input_ids, criterion, needs, together, borders, slopes, lowest
            )
            if chain.outside:
                parts = headed if first else together
                found |= _outside(chain, input_ids, criterion, needs, parts, borders, slopes)
    return {name: found[name] for name in needs}


def _through_blocks(
    chain: Chain,
    input_ids: torch.Tensor,
    criterion: Criterion,
    needs: Mapping[str, Need],
    parts: list[slice],
    borders: Borders,
    slopes: Borders,
    lowest: int,
) -> dict[str, Sums]:
    """Pull the gradient back through every block down to ``lowest``; leaves its input's slope."""
    found: dict[str, Sums] = {}
    order = range(len(chain.blocks) - 1, lowest - 1, -1)
    steps = [(index, part) for index in order for part in parts]
    gradients = GradientSums({}, criterion)
    for index, part in track(steps, "importance: blocks"):
        owned = chain.owned[index]
        if part is parts[0]:
            gradients = GradientSums(owned, criterion)
            for parameter in owned.values():
                parameter.requires_grad_(True)
        leaf, output = chain.run_block(index, input_ids[part], borders.read(index, part))
        slope = slopes.read(0, part).to(output.device)
        inputs = [leaf, *owned.values()]
        (below, *own), factor = pull_back([output], inputs, [(slope, 1.0)], part)
        gradients.add(own, factor)
        store_slope(slopes, part, below, factor)
        if part is parts[-1]:
            found |= gradients.sums(needs, len(input_ids))
            borders.drop(index)
            for parameter in owned.values():
                parameter.requires_grad_(False)
    return found


def _outside(
    chain: Chain,
    input_ids: torch.Tensor,
    criterion: Criterion,
    needs: Mapping[str, Need],
    parts: list[slice],
    borders: Borders,
    slopes: Borders,
) -> dict[str, Sums]:
    """Return the sums of the parameters outside the blocks (embedding, last norm, head).

    Bottom and top run together, so that a tensor that is used in both, as a tied embedding, gets
    the sum of both gradients before it is squared.
    """
    last = len(chain.blocks) - 1
    gradients = GradientSums(chain.outside, criterion)
    for parameter in chain.outside.values():
        parameter.requires_grad_(True)
    for part in track(parts, "importance: embedding and head"):
        entries: list[torch.Tensor] = []
        top = borders.read(last + 1, part)

        def handler(
            at: int,
            _: Call,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            entries: list[torch.Tensor] = entries,
            top: torch.Tensor = top,
        ) -> Any:
            given = hidden_of(args, kwargs)
            if at == 0:
                entries.append(given)
            return chain.as_output(at, top.to(given.device) if at == last else given)

        logits = chain.run(input_ids[part], handler)
        outputs = [logits]
        cotangents = [loss_cotangent(logits, input_ids[part], part.start)]
        if chain.bottom:
            outputs.append(entries[0])
            cotangents.append((slopes.read(0, part).to(entries[0].device), 1.0))
        inputs = list(chain.outside.values())
        keep = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
        gradients.add(
            *pull_back([pair[0] for pair in keep], inputs, [pair[1] for pair in keep], part)
        )
    return gradients.sums(needs, len(input_ids))
