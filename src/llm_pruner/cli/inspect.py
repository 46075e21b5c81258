"""``llm-pruner inspect``: what of a model can be pruned, and what cannot and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

from llm_pruner.cli.output import Screen, write_json
from llm_pruner.errors import UserError
from llm_pruner.report.text import clean, count
from llm_pruner.settings.evaluate import InspectSettings

EXAMPLES = """\b
Examples:
  llm-pruner inspect default
  llm-pruner inspect ./llama --layer 5 --json groups.json
"""

FOLLOWER = "value_dim"
"""A kind that cannot be pruned by itself."""
_MOST_LINES = 8


def run(settings: InspectSettings, json: str | None) -> None:
    """Show what of a model can be pruned, and what cannot and why."""
    from llm_pruner.commands.inspect import inspect_model

    found, layer = inspect_model(settings), settings.layer
    layers = sorted({g["layer"] for g in found["groups"] if g["layer"] is not None})
    if layer is None and layers:
        layer = layers[len(layers) // 2]
    if layer is not None and layer not in layers:
        there = f"layers {layers[0]} to {layers[-1]}" if layers else "no layers"
        raise UserError(f"--layer {layer}: the model has {there}")
    write_json(found, json)
    if json == "-":
        return
    out = Screen()
    out.print(f"{clean(found['model'])}: {count(found['parameters'])} parameters")
    here = {} if layer is None else {f"Layer {layer} of {len(layers)}": layer}
    for title, of in {**here, "Across layers": None}.items():
        groups = [group for group in found["groups"] if group["layer"] == of]
        if groups:
            _show_groups(out, title, groups)
    _show_kinds(out, found)
    out.print("A parameter can belong to several kinds, so their shares do not add up.\n")
    out.print(_embeddings(found) + "\n")
    _show_frozen(out, found)


def _embeddings(found: dict[str, Any]) -> str:
    from llm_pruner.commands.inspect import tokens_go_first

    tokens, embeddings, parameters = (found[n] for n in ("tokens", "embeddings", "parameters"))
    said = f"Embeddings of {tokens:,} tokens: {count(embeddings)} parameters, "
    said += f"{100 * embeddings / parameters:.1f}% of all."
    if not tokens_go_first(tokens, embeddings, parameters):
        return said
    said += " Take out those that your texts do not need before you prune: llm-pruner vocab, or "
    return f"{said}compress --vocab-text."


def _show_groups(out: Screen, title: str, groups: list[dict[str, Any]]) -> None:
    rows = [
        (group["name"], _units(group), _touches(group), f"{100 * group['share']:.2f}%")
        for group in groups
    ]
    columns = ("group", "units", "parameters touched", "of model")
    out.table(title, columns, rows, text=("parameters touched",))


def _units(group: dict[str, Any]) -> str:
    units = f"{group['units']:,}"
    if group["frozen"] is not None:
        return f"{units}, frozen"
    if group["least"] > 1:
        units += f", {group['least']} must stay"
    return f"{units}, with head_dim" if group["kind"] == FOLLOWER else units


def _touches(group: dict[str, Any]) -> str:
    """Name the tensors in short, each with the axis and how many positions a unit owns."""
    shown = Counter(
        f"{'.'.join(m['tensor'].split('.')[-2:])}[{m['dim']}] x{m['positions_per_unit']}"
        for m in group["members"]
        if not m["buffer"]
    )
    lines = [f"{line} ({times} times)" if times > 1 else line for line, times in shown.items()]
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(lines[:_MOST_LINES] + more) or f"{len(group['modules'])} modules"


def _show_kinds(out: Screen, found: dict[str, Any]) -> None:
    rows = [
        (
            kind["kind"],
            kind["groups"],
            "follows head_dim" if kind["kind"] == FOLLOWER else f"{kind['prunable_units']:,}",
            f"{100 * kind['share']:.1f}%",
        )
        for kind in found["kinds"]
    ]
    out.table("By kind", ("kind", "groups", "prunable units", "of model"), rows)


def _show_frozen(out: Screen, found: dict[str, Any]) -> None:
    places: dict[str, list[str]] = {}
    for axis in found["frozen"]:
        places.setdefault(axis["reason"], []).append(f"{axis['tensor']}[{axis['dim']}]")
    for group in found["groups"]:
        if group["frozen"] is not None:
            places.setdefault(group["frozen"], []).append(group["name"])
    rows = [(why, len(where), where[0]) for why, where in places.items()]
    if rows:
        rows.sort(key=lambda row: -row[1])
        out.table("Frozen", ("why", "axes or groups", "such as"), rows, text=("such as",))
