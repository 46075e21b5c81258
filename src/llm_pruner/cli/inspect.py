"""``llm-pruner inspect``: what of a model can be pruned, and what cannot and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Annotated, Any

import typer

from llm_pruner.cli import options
from llm_pruner.cli.output import clean, console, count, table, write_json
from llm_pruner.errors import UserError
from llm_pruner.pipeline.inspect import inspect_model
from llm_pruner.pipeline.settings import ModelSettings


def command(
    model: options.Model,
    layer: Annotated[
        int | None, typer.Option(help="Layer to show; the middle one by default.")
    ] = None,
    revision: options.Revision = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = None,
) -> None:
    """Show the groups of a layer, their parameters, and what is frozen and why."""
    found = inspect_model(ModelSettings(model, revision, dtype, device, trust_remote_code))
    layers = sorted({g["layer"] for g in found["groups"] if g["layer"] is not None})
    if layer is None:
        layer = layers[len(layers) // 2] if layers else None
    elif layer not in layers:
        raise UserError(
            f"--layer {layer}: the model has layers {layers[0]} to {layers[-1]}; give one of these"
            if layers
            else f"--layer {layer}: the model has no layers; leave the option out"
        )
    write_json(found, json)
    if json == "-":
        return
    out = console()
    out.print(f"{clean(found['model'])}: {count(found['parameters'])} parameters")
    here = [g for g in found["groups"] if g["layer"] == layer and layer is not None]
    across = [g for g in found["groups"] if g["layer"] is None]
    if here:
        out.print(_groups(f"Layer {layer} of {len(layers)}", here))
    if across:
        out.print(_groups("Across layers", across))
    out.print(_shares(found["groups"]))
    _print_frozen(out, found)


def _groups(title: str, groups: list[dict[str, Any]]) -> Any:
    rows = []
    for group in groups:
        members = [m for m in group["members"] if not m["buffer"]]
        touches = _touches(members) if members else f"{len(group['modules'])} modules"
        rows.append((group["name"], group["units"], touches, f"{100 * group['share']:.2f}%"))
    columns = ("group", "units", "parameters touched", "of model")
    return table(title, columns, rows, text=("parameters touched",))


def _touches(members: list[dict[str, Any]]) -> str:
    """Name the tensors in short, each with the axis and how many positions a unit owns."""
    shown = [f"{_short(m['tensor'])}[{m['dim']}] x{m['positions_per_unit']}" for m in members[:4]]
    if len(members) > 4:
        shown.append(f"and {len(members) - 4} more")
    return "\n".join(shown)


def _short(tensor: str) -> str:
    parts = tensor.split(".")
    return ".".join(parts[-2:]) if len(parts) > 1 else tensor


def _shares(groups: list[dict[str, Any]]) -> Any:
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        kinds[group["kind"]].append(group)
    rows = []
    for kind, same in kinds.items():
        free = [g for g in same if g["frozen"] is None]
        share = (
            sum(g["share"] for g in free) if kind not in ("hidden",) else free and free[0]["share"]
        )
        rows.append((kind, len(same), sum(g["units"] for g in free), f"{100 * (share or 0):.1f}%"))
    return table("By kind", ("kind", "groups", "prunable units", "of model"), rows)


def _print_frozen(out: Any, found: dict[str, Any]) -> None:
    reasons: Counter[str] = Counter()
    example: dict[str, str] = {}
    for axis in found["frozen"]:
        reasons[axis["reason"]] += 1
        example.setdefault(axis["reason"], f"{axis['tensor']}[{axis['dim']}]")
    for group in found["groups"]:
        if group["frozen"] is not None:
            reasons[group["frozen"]] += 1
            example.setdefault(group["frozen"], group["name"])
    if reasons:
        rows = [(why, number, example[why]) for why, number in reasons.most_common()]
        out.print(table("Frozen", ("why", "axes or groups", "such as"), rows, text=("such as",)))
