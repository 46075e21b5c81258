"""Try every causal language model that transformers registers, and write the table of results.

For each type a tiny random model is built and traced, each kind of structure is pruned alone and
all together, and every pruned model is compared with its masked twin, in one pass over the tokens
and in decoding with the cache. The pruned model is saved, loaded and compared, and
members of groups are shifted by one unit to see that the twin would notice.

    python tools/architectures.py [--only type,type] [--jobs 2] [--out FILE.md] [--json FILE.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests/support")]

from tiny_configs import NOT_DECODERS, TYPES, tiny_config  # noqa: E402

from llm_pruner.checkpoints import save_checkpoint  # noqa: E402
from llm_pruner.discovery.groups import discover  # noqa: E402
from llm_pruner.discovery.run import named_tensors  # noqa: E402
from llm_pruner.errors import DiscoveryError, UserError  # noqa: E402
from llm_pruner.models.forward import run_for_logits  # noqa: E402
from llm_pruner.models.layers import sharing_copy  # noqa: E402
from llm_pruner.models.load import load_model  # noqa: E402
from llm_pruner.surgery.cut import cut_  # noqa: E402
from llm_pruner.surgery.twin import pruned_logits, twin_logits  # noqa: E402
from llm_pruner.surgery.verify import largest_difference  # noqa: E402
from llm_pruner.types import Discovery, Group, Removal  # noqa: E402
from removals import bound_to, pick, scenes_apart  # noqa: E402

TIME_LIMIT = 90.0
"""Seconds for one type."""

TOLERANCE = 1e-5
"""Largest difference from the twin, relative to the largest logit or 1."""

_KINDS = ("stock", "remote_code", "recipe")

VISIBLE = TOLERANCE
"""A shifted member is noticed if it moves a logit by more than this, on the same scale."""


@dataclass
class Row:
    """What the sweep found for one type.

    Attributes:
        type: as transformers names it.
        result: ``passes``, ``ffn only``, ``frozen``, ``no decoder``, ``cannot run``, ``WRONG`` or
            ``CRASH``.
        reason: of a result that is no pass.
        name: class of the model.
        parameters: of the tiny model.
        kinds: kind -> [prunable groups, prunable units, groups that are frozen].
        twin: kind (or "all") -> largest difference relative to the logits.
        unseen: kinds whose removal left the logits as they were, so that the twin shows nothing.
        frozen: [reason, positions] of what cannot be pruned, the largest first.
        reload: ``stock``, ``remote_code`` or ``recipe`` if the saved model gives the same bits,
            also by the code in its folder, else what is wrong.
        by_block: ``same`` if it gives the same bits with its weights read block by block, in
            bfloat16, else what is wrong; empty if ``AutoModelForCausalLM`` does not load it so.
        shifted: members that were shifted by one unit.
        caught: those whose shift was noticed.
        missed: tensors of the others.
        seconds: time for the type.
        trace_seconds: time for the discovery.
    """

    type: str
    result: str = ""
    reason: str = ""
    name: str = ""
    parameters: int = 0
    kinds: dict[str, list[int]] = field(default_factory=dict)
    twin: dict[str, float] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    frozen: list[tuple[str, int]] = field(default_factory=list)
    reload: str = ""
    by_block: str = ""
    shifted: int = 0
    caught: int = 0
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    trace_seconds: float = 0.0


# ------------------------------------------------------------------------------------ one type


def tiny_model(model_type: str, seed: int = 0) -> nn.Module:
    """Return the random model of a type in float32 and eval mode.

    Biases, norms and buffers of zeros are random as well: at zeros and ones a mistake in them
    would go unseen.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if not parameter.is_floating_point():
                continue
            if parameter.ndim == 1:
                parameter.copy_(torch.nan_to_num(parameter) + 0.3 * noise)
            else:
                parameter.copy_(0.15 * noise)
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.numel() > 1 and not buffer.any():
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.eval()
    return model


def examine(model_type: str, *, thorough: bool = True) -> Row:
    """Try one type; what goes wrong becomes the result.

    Args:
        thorough: run a kind that is pruned alone, and the model that was saved, in every scene, as
            all kinds together are, and shift a member of every group; else in the first scene, and
            of one group of those that differ in nothing but the layer.
    """
    row = Row(model_type)
    if model_type in NOT_DECODERS:
        row.result, row.reason = "no decoder", NOT_DECODERS[model_type]
        return row
    try:
        model = tiny_model(model_type)
    except Exception as error:
        row.result, row.reason = "cannot run", f"no tiny model: {_line(error)}"
        return row
    row.name = type(model).__name__
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        _examine(model, row, thorough)
    except DiscoveryError as error:
        row.result, row.reason = "cannot run", _line(error)
    except Exception as error:
        row.result, row.reason = "CRASH", _line(error) + _place(error)
    return row


def _examine(model: nn.Module, row: Row, thorough: bool) -> None:
    started = time.monotonic()
    discovery = discover(model)
    row.trace_seconds = round(time.monotonic() - started, 2)
    for group in discovery.groups:
        entry = row.kinds.setdefault(group.kind, [0, 0, 0])
        if group.frozen is None:
            entry[0] += 1
            entry[1] += group.size
        else:
            entry[2] += 1
    row.frozen = _reasons(discovery)
    dense = pruned_logits(model, discovery)
    if not all(bool(logits.isfinite().all()) for logits in dense):
        row.result, row.reason = "CRASH", "the dense model's logits are not finite"
        return
    scale = max(1.0, *(float(logits.abs().max()) for logits in dense))
    row.by_block = _by_block(model)
    kinds = [kind for kind, (groups, _, _) in row.kinds.items() if groups]
    wrong = []
    alone = discovery if thorough else scenes_apart(discovery)[0]
    for kind in [*kinds, "all"]:
        seen_in = discovery if kind == "all" else alone
        removal = pick(discovery, None if kind == "all" else (kind,))
        if not removal:
            continue
        expected = twin_logits(model, seen_in, removal)
        smaller = copy.deepcopy(model)
        edits = cut_(smaller, discovery, removal)
        actual = pruned_logits(smaller, seen_in)
        difference = largest_difference(expected, actual) / scale
        row.twin[kind] = difference
        if not difference <= TOLERANCE:
            wrong.append(f"{kind} by {difference:.1e}")
        if largest_difference(dense[: len(actual)], actual) / scale <= VISIBLE:
            row.unseen.append(kind)
        if kind == "all":
            row.reload = _reload(model, smaller, edits, alone, actual)
        elif difference <= TOLERANCE:
            groups = [group for group in discovery.groups if group.kind == kind]
            groups = [group for group in groups if not group.frozen and group.name in removal]
            groups = groups if thorough else _one_of_each(groups)
            _shift(model, discovery, groups, seen_in, removal, expected, scale, row)
    if wrong:
        row.result, row.reason = "WRONG", "differs from the twin: " + ", ".join(wrong)
    elif set(kinds) - {"ffn", "layers"}:
        row.result = "passes"
    elif kinds:
        row.result = "ffn only"
    else:
        row.result = "frozen"
        row.reason = row.frozen[0][0] if row.frozen else "no axis is prunable"


def _one_of_each(groups: Sequence[Group]) -> list[Group]:
    """Return the first of those groups whose tensors differ in nothing but their numbers."""
    found: dict[str, Group] = {}
    for group in groups:
        tensors = " ".join(member.tensor for member in group.members)
        found.setdefault(_numberless(tensors), group)
    return list(found.values())


def _numberless(names: str) -> str:
    return re.sub(r"[.][0-9]+[.]", ".*.", names)


def _reasons(discovery: Discovery) -> list[tuple[str, int]]:
    count: Counter[str] = Counter()
    for axis in discovery.frozen:
        if axis.reason != "the vocabulary":
            count[axis.reason] += axis.positions
    for group in discovery.groups:
        if group.frozen is not None:
            count[group.frozen] += group.size
    return count.most_common()


def _reload(
    model: nn.Module,
    smaller: nn.Module,
    edits: Any,
    discovery: Discovery,
    actual: Sequence[torch.Tensor],
) -> str:
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model"
            saved = save_checkpoint(
                smaller,  # type: ignore[arg-type]
                out,
                edits=edits,
                plan_json="{}\n",
                tokenizer=None,
                dense_config=model.config,  # type: ignore[arg-type]
            )
            loads: list[tuple[Any, dict[str, Any]]] = [(type(model), {})]
            if saved.kind == "remote_code":
                loads.append((AutoModelForCausalLM, {"trust_remote_code": True}))
            difference, same = 0.0, True
            for loader, trust in loads:
                again = loader.from_pretrained(out, dtype=torch.float32, **trust)
                logits = pruned_logits(again, discovery)
                found = largest_difference(list(actual[: len(logits)]), logits)
                difference, same = max(difference, found), same and _same_weights(smaller, again)
    except Exception as error:
        return f"fails: {_line(error)}{_place(error)}"
    # Weights that were read from a file lie elsewhere in memory, which moves the last bit of sums.
    if same and difference <= TOLERANCE:
        return saved.kind
    return f"differs: {difference:.1e}" + ("" if same else ", and weights do")


def _by_block(model: nn.Module) -> str:
    tokens = torch.arange(3, 15)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loads = partial(load_model, folder, tokenizer_required=False, reads_tokenizer=False)
        try:
            narrow: Any = copy.deepcopy(model).to(torch.bfloat16)
            narrow.save_pretrained(folder)
            expected = run_for_logits(loads().model, tokens)
        except (UserError, AttributeError):
            return ""  # it is no model of its own, or does not run without a cache that it is given
        try:
            found = run_for_logits(loads(memory=1).model, tokens)
        except Exception as error:
            return f"fails: {_line(error)}{_place(error)}"
    return "same" if torch.equal(expected, found) else "differs"


def _same_weights(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = ({k: v.clone() for k, v in m.state_dict().items()} for m in (left, right))
    for name, module in left.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # transformers sets the row of the padding to zero as it loads a model.
            for weights in (ours, theirs):
                weights[f"{name}.weight"][module.padding_idx] = 0
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


def _shift(
    model: nn.Module,
    discovery: Discovery,
    groups: Sequence[Group],
    seen_in: Discovery,
    removal: Removal,
    expected: list[torch.Tensor],
    scale: float,
    row: Row,
) -> None:
    """Give one random member of each group the positions of its neighbours; count what shows."""
    rng = np.random.default_rng(sum(map(ord, row.type + groups[0].kind)))
    for group in groups:
        if not group.members:
            continue
        part = {name: removal[name] for name in bound_to(discovery, group) if name in removal}
        place = int(rng.integers(len(group.members)))
        member = group.members[place]
        moved = replace(member, index=np.roll(member.index, 1, axis=0))
        if np.array_equal(
            np.sort(member.index[part[group.name]].ravel()),
            np.sort(moved.index[part[group.name]].ravel()),
        ):
            continue
        if _same_everywhere(model, member.tensor, member.dim):
            continue
        members = (*group.members[:place], moved, *group.members[place + 1 :])
        changed = tuple(
            replace(group, members=members) if other.name == group.name else other
            for other in discovery.groups
        )
        row.shifted += 1
        seen = _differs(model, replace(seen_in, groups=changed), removal, expected, scale)
        if not seen:
            # Other removals may hide it: attention over what has become a single key, say.
            alone = (
                logits
                for scene in scenes_apart(discovery)
                for logits in twin_logits(model, scene, part)
            )
            shifted = replace(discovery, groups=changed)
            seen = _differs(model, shifted, part, alone, scale)
        if seen:
            row.caught += 1
        else:
            row.missed.append(member.tensor)


def _differs(
    model: nn.Module,
    discovery: Discovery,
    removal: Removal,
    expected: Iterable[torch.Tensor],
    scale: float,
) -> bool:
    """Whether the pruned model differs from its twin in any scene; the first one will do.

    Args:
        expected: logits of the twin, of which no more are taken than it needs.
    """
    smaller = sharing_copy(model)
    cut_(smaller, discovery, removal)
    left = iter(expected)
    for scene in scenes_apart(discovery):
        found = pruned_logits(smaller, scene)
        if largest_difference([*islice(left, len(found))], found) / scale > VISIBLE:
            return True
    return False


def _same_everywhere(model: nn.Module, name: str, dim: int) -> bool:
    """Whether all positions along an axis hold the same, so that a shift changes nothing.

    Nearly the same are the decays of a last layer of MiniMax, powers of 0.99999.
    """
    tensor = next(tensor for other, tensor, _ in named_tensors(model) if other == name)
    return torch.allclose(tensor.roll(1, dim), tensor, rtol=1e-4, atol=1e-6)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(frame.filename).name}:{frame.lineno})"


# ----------------------------------------------------------------------------------- the sweep


def _work(model_type: str, sender: Connection) -> None:
    _quiet()
    sender.send(examine(model_type))
    sender.close()


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def sweep(types: Sequence[str], jobs: int = 2, limit: float = TIME_LIMIT) -> Iterator[Row]:
    """Examine each type in a process of its own; a crash or a hang is the result of that type."""
    context = multiprocessing.get_context("fork")
    pending = list(types)
    running: dict[Connection, tuple[str, Any, float]] = {}
    while pending or running:
        while pending and len(running) < jobs:
            model_type = pending.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(model_type, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (model_type, process, time.monotonic())
        ready = wait(list(running), timeout=0.5)
        for receiver in list(running):
            model_type, process, started = running[receiver]
            elapsed = time.monotonic() - started
            if receiver in ready:
                try:
                    row = receiver.recv()  # type: ignore[attr-defined]
                except EOFError:
                    process.join()
                    row = Row(model_type, "CRASH", f"the process ended with {process.exitcode}")
            elif elapsed > limit:
                process.terminate()
                row = Row(model_type, "CRASH", f"took more than {limit:.0f} s")
            else:
                continue
            row.seconds = round(elapsed, 1)
            process.join()
            del running[receiver]
            yield row


# ----------------------------------------------------------------------------------- the table

_ORDER = ("passes", "ffn only", "frozen", "cannot run", "no decoder", "WRONG", "CRASH")
_HARMLESS = (
    (
        r"original_inv_freq$",
        "a copy of the rotary frequencies, which is read only when their base changes",
    ),
    (
        r"(k_proj|key|Wk|k_norm|k_layernorm|k_attn)\.bias$",
        "a bias of keys that are not rotated adds one number to all scores of a query, which "
        "softmax does not see",
    ),
    (
        r"layers\.0\.attn_hc\.base$",
        "before the first layer all streams are equal, so that their mixture differs in scale "
        "alone, and a norm follows",
    ),
    (
        r"rel_attn\.(seg_embed|r_s_bias)$",
        "scores of segments, which are computed only where their ids are given",
    ),
    (
        r"experts\.[a-z_]+$",
        "weights of an expert that no token of the run was given",
    ),
    (
        r"(patcher|indexer)\.|(gate|router)\.weight$|e_score_correction_bias$",
        "decides a choice (where BLT cuts its input, which tokens an indexer selects, which expert "
        "is best), and shows only when the choice changes",
    ),
)
"""Name of a tensor -> why a shift of it need not show in the logits."""
UNEXPLAINED = "not explained"


def why_unseen(name: str) -> str:
    return next((why for form, why in _HARMLESS if re.search(form, name)), UNEXPLAINED)


def markdown(rows: Sequence[Row]) -> str:
    """Return the page: summary, table of results, and the types that were not examined."""
    count = Counter(row.result for row in rows)
    shifted, caught = sum(row.shifted for row in rows), sum(row.caught for row in rows)
    missed: dict[str, Counter[str]] = {}
    for row in rows:
        for name in row.missed:
            same = missed.setdefault(why_unseen(name), Counter())
            same[f"{row.type} `{_numberless(name)}`"] += 1
    tried = [row for row in rows if row.twin]
    worst = max((max(row.twin.values()) for row in tried), default=0.0)
    reloads = Counter(row.reload for row in tried if row.reload)
    by_block = Counter(
        row.by_block if row.by_block == "same" else f"{row.type} {row.by_block}"
        for row in rows
        if row.by_block
    )
    lines = [
        "<!-- Generated by `python tools/architectures.py`; do not edit. -->",
        "",
        "# Architectures",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}.",
        "",
        f"All {len(rows)} causal language models that `transformers` registers, each as a tiny",
        "model with random weights, norms and biases. Each kind of structure is pruned alone and",
        "all together (a third of the units). *Twin* is the largest difference between the pruned",
        "model and the dense one with the same units silenced, on short and long input, with",
        "padding, through `generate` and in training mode, relative to the largest logit;",
        f"{TOLERANCE:.0e} is the limit.",
        "",
        "| result | types |",
        "|---|---|",
        *(f"| {result} | {count[result]} |" for result in _ORDER if count[result]),
        "",
        f"- Largest difference from the twin: {worst:.1e}.",
        f"- Saved and loaded with the same bits: {sum(reloads[kind] for kind in _KINDS)} of "
        f"{sum(reloads.values())} ({reloads['stock']} as plain checkpoints, "
        f"{reloads['remote_code']} with code beside them, {reloads['recipe']} with a recipe).",
        f"- Weights in bfloat16 read block by block, with the same bits: {by_block['same']} of "
        f"{sum(by_block.values())}"
        + "".join(f"; {name}" for name in sorted(by_block) if name != "same")
        + ".",
        f"- Mutation control: one random member of every group takes its neighbour's positions; "
        f"{caught} of {shifted} shifts "
        f"({100 * caught / max(shifted, 1):.1f}%) show in the logits.",
    ]
    for why in sorted(missed, key=lambda why: (why == UNEXPLAINED, why)):
        listed = ", ".join(
            name + (f" ({number})" if number > 1 else "") for name, number in missed[why].items()
        )
        lines.append(f"  - Not seen, {why}: {listed}.")
    lines += [
        "",
        "*Can be pruned* lists kind x groups. *passes* means that something besides the FFN and",
        "whole layers is prunable and that all of it equals the twin.",
        "",
        "| type | class | result | can be pruned | frozen, because | twin | reload |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.type):
        if row.result == "no decoder":
            continue
        kinds = ", ".join(f"{kind} x {n}" for kind, (n, _, _) in row.kinds.items() if n)
        frozen = "; ".join(f"{reason} ({number})" for reason, number in row.frozen[:3])
        result = row.result if not row.reason else f"{row.result}: {row.reason}"
        twin = f"{max(row.twin.values()):.0e}" if row.twin else ""
        cells = [row.type, row.name, result, kinds, frozen, twin, row.reload]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    others = [row for row in rows if row.result == "no decoder"]
    if others:
        lines += ["", "## No decoder of text on its own", "", "| type | why |", "|---|---|"]
        lines += [f"| {row.type} | {_cell(row.reason)} |" for row in others]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    short = text if len(text) <= 240 else text[:237] + "..."
    return short.replace("|", "\\|").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; returns 1 if a type is wrong or crashes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help="types, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args(arguments)
    types = options.only.split(",") if options.only else TYPES
    _quiet()
    started = time.monotonic()
    rows = []
    for row in sweep(types, options.jobs):
        rows.append(row)
        twin = f"{max(row.twin.values()):.1e}" if row.twin else "-"
        kinds = " ".join(f"{kind}:{n}/{n + frozen}" for kind, (n, _, frozen) in row.kinds.items())
        print(
            f"{len(rows):3d} {row.type:28s} {row.result:10s} {row.seconds:5.1f}s twin {twin:8s} "
            f"{row.caught}/{row.shifted} {row.reload[:120]} | {kinds} | {row.reason}",
            flush=True,
        )
        if row.missed:
            print("      not seen:", ", ".join(row.missed))
    rows.sort(key=lambda row: row.type)
    print(Counter(row.result for row in rows), f"{time.monotonic() - started:.0f} s")
    if options.out:
        options.out.write_text(markdown(rows), encoding="utf-8")
    if options.json:
        content = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(row.result in ("WRONG", "CRASH") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
