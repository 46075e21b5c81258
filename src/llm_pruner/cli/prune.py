"""``llm-pruner prune``: a checkpoint in, a smaller checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llm_pruner.cli import options
from llm_pruner.cli.output import check_json, command_line, write_json
from llm_pruner.cli.pruned import as_data, show
from llm_pruner.errors import UserError
from llm_pruner.runtime.memory import PRUNING, keep_kernels

if TYPE_CHECKING:
    from llm_pruner.planning.target import Scope

EXAMPLES = """\b
Examples:
  llm-pruner prune default --out small --ratio 0.2
  llm-pruner prune ./llama --out small --ratio 0.2 --recipe best
  llm-pruner prune ./llama --out small --params 5.4B --calibration c4
  llm-pruner prune ./llama --out plan.json --ratio 0.2 --dry-run
  llm-pruner prune ./llama --out small --plan plan.json
"""

_HOW_MUCH, _WHERE = "How much (one of these, or --plan)", "Where from"
_IMPORTANCE, _CALIBRATION, _PLAN = "Importance", "Calibration text", "Plan"

_PLANNED = (
    *("ratio", "params", "unit_ratio", "kv_cache", "decode_time", "structures", "scope"),
    *("protect_first", "protect_last", "layers", "round_to", "criterion", "order", "reduction"),
    *("aggregate", "steps", "score_samples", "recipe", "budget_split", "spread", "uniform"),
    *("how_allocated", "search_trials", "search_minutes"),
)
"""Options that make a plan, which a plan that is replayed leaves nothing to say for."""

_TEXT = ("calibration", "samples", "seq_len", "split", "text_field", "seed")
"""Options about text, which a replay reads only for compensation."""

AUTO, EQUAL = "auto", "equal"


def command(
    context: typer.Context,
    model: options.Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder to write; with --dry-run the plan file.",
            rich_help_panel=options.OUTPUT,
        ),
    ],
    overwrite: options.Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="Compare with the masked twin, and the saved folder with the model in memory.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = True,
    max_shard_size: options.MaxShardSize = "5GB",
    json: options.JsonBesideOut = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of all parameters to remove, such as 0.2.",
            rich_help_panel=_HOW_MUCH,
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="Parameters to keep, such as 5.4B or 107.6M.",
            rich_help_panel=_HOW_MUCH,
        ),
    ] = None,
    unit_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of units to remove in each chosen layer, as in the paper.",
            rich_help_panel=_HOW_MUCH,
        ),
    ] = None,
    kv_cache: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the key-value cache per token to remove, by pruning heads (or what "
            "--structures says).",
            rich_help_panel=_HOW_MUCH,
        ),
    ] = None,
    decode_time: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the time of a decoding step to save on this machine, found by timing.",
            rich_help_panel=_HOW_MUCH,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Settings that go together: paper, balanced, best, fast, or a YAML file; options "
            "given beside it win.",
            show_default=False,
            rich_help_panel=_HOW_MUCH,
        ),
    ] = None,
    structures: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="What to remove: heads, query_heads, ffn, hidden, head_dim, experts, layers.",
            rich_help_panel=_WHERE,
        ),
    ] = "heads,ffn",
    scope: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="local: the same share of each group; global: one ranking by importance per "
            "removed parameter; measured: one ranking by what trial removals cost per parameter.",
            rich_help_panel=_WHERE,
        ),
    ] = "local",
    budget_split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="SHARES",
            help="Of the removed parameters by structure, such as heads=0.1,ffn=0.9; auto: found "
            "by trial removals on calibration text; equal: the same share of each structure. "
            "[default: auto where the criterion reads text]",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    spread: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help="With --scope global or measured, let no layer lose more than this times the "
            "average share.",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    how_allocated: Annotated[
        str,
        typer.Option(
            "--allocate",
            metavar="NAME",
            help="How a share is laid over the layers with --scope local: even; log: more to later "
            "layers; owl: less where few units matter most. With any scope, search: then move "
            "units between layers while held-out text says that it helps.",
            rich_help_panel=_WHERE,
        ),
    ] = "even",
    search_trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of --allocate search. [default: 100]",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    search_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="End the search after this time.",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="Keep the same number of units in all layers, so that the result usually loads "
            "without this package.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    protect_first: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Layers to keep whole at the start. [default: a quarter, at most 4]",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    protect_last: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Layers to keep whole at the end. [default: a fifth, at most 3]",
            show_default=False,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES",
            help="Layers to prune by structure, such as heads=4-26,ffn=2-28; replaces the "
            "protection.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    round_to: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Keep a multiple of this many channels; auto: the smallest that this machine "
            "multiplies at full speed.",
            rich_help_panel=_WHERE,
        ),
    ] = "1",
    criterion: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="random, l1, l2, taylor, gate, fisher, fisher-obs, wanda, fluctuation, "
            "contribution, influence, obs, leverage or reap.",
            rich_help_panel=_IMPORTANCE,
        ),
    ] = "taylor",
    order: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of taylor: first, second or mixed.",
            rich_help_panel=_IMPORTANCE,
        ),
    ] = "first",
    reduction: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Of taylor: element or vector.", rich_help_panel=_IMPORTANCE
        ),
    ] = "element",
    aggregate: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Over the members of a group: sum, prod, max or last.",
            rich_help_panel=_IMPORTANCE,
        ),
    ] = "sum",
    steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Prune in steps, estimating anew before each.",
            rich_help_panel=_IMPORTANCE,
        ),
    ] = 1,
    compensation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="least-squares: refit what reads the removed units, on the calibration text; "
            "bias: add what they gave on average; or none.",
            rich_help_panel=_IMPORTANCE,
        ),
    ] = "none",
    calibration: Annotated[
        str,
        typer.Option(
            metavar="SRC",
            help="self (the model writes its own text), a hub dataset, or a .txt, .jsonl, .json or "
            ".parquet file; several, parted by commas, for equal parts of each.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = "self",
    samples: Annotated[
        int, typer.Option(metavar="N", help="Number of sequences.", rich_help_panel=_CALIBRATION)
    ] = 128,
    seq_len: Annotated[
        int, typer.Option(metavar="N", help="Tokens of each.", rich_help_panel=_CALIBRATION)
    ] = 128,
    score_samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Estimate importance on only this many of them.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--text-split",
            metavar="NAME",
            help="Split of a hub dataset.",
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Field that holds the text.", rich_help_panel=_CALIBRATION
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Replay this plan instead of making one.", rich_help_panel=_PLAN
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Write the plan to --out and stop.", rich_help_panel=_PLAN),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Of calibration text and random choice.", rich_help_panel=_PLAN
        ),
    ] = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Remove the least important structures and save a smaller model."""
    keep_kernels(PRUNING)
    from llm_pruner.settings.presets import recipe_file

    reads = (model, plan, *calibration.split(","), calibration, recipe and recipe_file(recipe))
    check_json(json, (*reads, out), None if dry_run else out)
    from llm_pruner.commands.by_preset import allocation_search, profile_of
    from llm_pruner.planning import Selection, Target, parse_count, parse_layer_ranges

    target, selection, search = None, None, None
    if recipe is not None and plan is None:
        settings = _from_recipe(context, recipe)
        structures = ",".join(settings.get("structures", structures.split(",")))
        scope = settings.get("scope", scope)
        spread = settings.get("spread", spread)
        how_allocated = settings.get("allocate", how_allocated)
        search_trials = settings.get("search_trials", search_trials)
        search_minutes = settings.get("search_minutes", search_minutes)
        budget_split = settings.get("split", budget_split)
        protect_first = settings.get("protect_first", protect_first)
        protect_last = settings.get("protect_last", protect_last)
        round_to = str(settings.get("round_to", round_to))
        criterion = settings.get("criterion", criterion)
        order = settings.get("order", order)
        reduction = settings.get("reduction", reduction)
        aggregate = settings.get("aggregate", aggregate)
        steps = settings.get("steps", steps)
        calibration = settings.get("calibration", calibration)
        samples = settings.get("samples", samples)
        if said := settings.get("score_samples"):
            score_samples = min(said, samples)  # of fewer samples than a recipe's: all
        seq_len = settings.get("seq_len", seq_len)
        compensation = settings.get("compensation", compensation)
    if uniform:
        scope = scope if _was_given(context, "scope") else "local"
        protect_first, protect_last = protect_first or 0, protect_last or 0
        if not _was_given(context, "spread"):
            spread = None
    if plan is None:
        asked = {"--ratio": ratio, "--params": params, "--unit-ratio": unit_ratio}
        _require_one({**asked, "--kv-cache": kv_cache, "--decode-time": decode_time})
        if kv_cache is not None:
            structures = structures if _was_given(context, "structures") else "heads"
            budget_split = budget_split if _was_given(context, "budget_split") else None
        target = Target(
            unit_ratio=unit_ratio,
            ratio=ratio,
            params=None if params is None else parse_count(params),
            kv_cache=kv_cache,
            decode_time=decode_time,
        )
        selection = Selection(
            structures=tuple(name.strip() for name in structures.split(",") if name.strip()),
            scope=cast("Scope", scope),
            protect_first=protect_first or 0,
            protect_last=protect_last or 0,
            layer_ranges={} if layers is None else parse_layer_ranges(layers),
            round_to=1 if round_to == AUTO else _multiple(round_to),
            split=_split(budget_split),
            spread=spread,
            uniform=uniform,
            profile=profile_of(how_allocated),
        )
        search = allocation_search(how_allocated, search_trials, search_minutes)
    elif given := _given(context, _PLANNED + (_TEXT if compensation == "none" else ())):
        raise UserError(f"--plan already says what to remove; drop {', '.join(given)}")

    from llm_pruner.commands.prune import prune_checkpoint
    from llm_pruner.importance import Criterion
    from llm_pruner.settings.common import CalibrationSettings, ModelSettings

    done = prune_checkpoint(
        ModelSettings(model, revision, dtype, device, trust_remote_code),
        out,
        target=target,
        selection=selection,
        protect_by_default=(protect_first is None, protect_last is None),
        round_by_speed=round_to == AUTO,
        criterion=Criterion(criterion, order, reduction, aggregate),
        calibration=CalibrationSettings(
            calibration, samples, seq_len, split, text_field, score_samples
        ),
        seed=seed,
        steps=steps,
        plan_file=plan,
        dry_run=dry_run,
        verify=verify,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        compensation=compensation,
        find_best_split=_finds_split(budget_split),
        search=search,
        reads=reads,
        command=command_line(),
    )
    write_json(as_data(done), json)
    if json != "-":
        show(done)


def _multiple(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--round-to {text} is no number; use such as 32, or auto") from None


def _require_one(asked: dict[str, object]) -> None:
    given = [name for name, value in asked.items() if value is not None]
    if not given:
        raise UserError(f"no target given; use one of {', '.join(asked)}, or --plan")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} say different things; give one of them")


def _given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Return those of the options that the user gave, as they are written."""
    given = []
    for name in names:
        if _was_given(context, name):
            renamed = {"budget_split": "split", "split": "text-split", "how_allocated": "allocate"}
            written = renamed.get(name, name)
            given.append("--" + written.replace("_", "-"))
    return given


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _from_recipe(context: typer.Context, name: str) -> dict[str, Any]:
    """Return the settings of a recipe that the user did not give as options."""
    from llm_pruner.settings.presets import read_recipe

    settings = read_recipe(name).model_dump(exclude_none=True)
    if isinstance(settings.get("split"), dict):
        settings["split"] = ",".join(f"{k}={v}" for k, v in settings["split"].items())
    names = {"split": "budget_split", "allocate": "how_allocated"}
    left = {
        key: value
        for key, value in settings.items()
        if not _was_given(context, names.get(key, key))
    }
    if _was_given(context, "layers"):
        left = {key: value for key, value in left.items() if not key.startswith("protect")}
    return left


def _split(text: str | None) -> dict[str, float] | None:
    from llm_pruner.planning import parse_split

    return None if text in (None, AUTO, EQUAL) else parse_split(str(text))


def _finds_split(text: str | None) -> bool | None:
    return None if text is None else text == AUTO
