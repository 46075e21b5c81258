"""Save a pruned model as an ordinary Hugging Face folder, with its plan beside the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightConverter

from llm_pruner.checkpoints import apply_recipe, meta, remote_code
from llm_pruner.checkpoints.recipe import Recipe, compose, from_json
from llm_pruner.checkpoints.stock_config import accepted, layer_values, stock_config
from llm_pruner.errors import LLMPrunerError, NeedsMemory, UserError
from llm_pruner.files.disk import expanded, folder_bytes, umask
from llm_pruner.files.outputs import atomic_directory, bytes_of
from llm_pruner.models.forward import module_of
from llm_pruner.models.layers import names_in_float32
from llm_pruner.models.modeling_pruned import with_own_rows
from llm_pruner.models.streaming import (
    as_before,
    is_model_streamed,
    keep_dtype_,
    saved_by_shard,
)
from llm_pruner.models.tokenizer import save_tokenizer
from llm_pruner.runtime.progress import quiet_bars
from llm_pruner.types import Edits

Kind = Literal["stock", "remote_code"]

SHARD = "1GB"

_OTHERS = "so nothing was saved; keep other layers, by --layers, or protect_first or protect_last"


def check_saved_by_shard(model: PreTrainedModel) -> None:
    """Raise NeedsMemory if a shard of streamed weights might end within one that joins several."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    joins = (one for one in conversions if isinstance(one, WeightConverter))
    if is_model_streamed(model) and any(len(one.target_patterns) > 1 for one in joins):
        raise NeedsMemory(
            f"files of a {type(model).__name__} hold several of its weights as one, which are not "
            "written block by block"
        )


@dataclass(frozen=True)
class SavedCheckpoint:
    """A folder that ``from_pretrained`` loads.

    Attributes:
        kind: ``stock`` has a plain config, ``remote_code`` modelling code beside it.
        bytes: size of all files in it.
        needs: what ``from_pretrained`` needs besides the folder: ``trust_remote_code=True`` for
            folders with code.
    """

    kind: Kind
    path: Path
    bytes: int
    needs: tuple[str, ...]


def save_checkpoint(
    model: PreTrainedModel,
    out: Path,
    *,
    edits: Edits,
    plan_json: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Mapping[str, bytes] = MappingProxyType({}),
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    dense_config: PreTrainedConfig | None = None,
    beside: Callable[[Path, Kind, tuple[str, ...]], None] | None = None,
    check: Callable[[Path], None] | None = None,
) -> SavedCheckpoint:
    """Write safetensors, config.json, generation config, tokenizer and plan.json to ``out``.

    Args:
        model: the pruned model; comes back as it was.
        out: the folder; appears only once it is complete.
        edits: what surgery changed since the model was loaded.
        plan_json: content of ``plan.json``; None for a model that was not pruned.
        tokenizer: saved beside the weights, or None.
        processor: further files, as ``LoadedModel.processor``.
        overwrite: replace a folder that this package wrote and that holds nothing else.
        max_shard_size: largest weight file, such as ``100MB``.
        dense_config: config of the model before surgery; needed if surgery changed
            ``model.config``.
        beside: called with the folder, its kind and what loading it needs, to write more files
            beside the weights.
        check: called with the complete folder before it appears under its name; what it raises
            stops the saving.

    Raises:
        UserError: ``out`` cannot be written, see ``check_output``, the model is quantized, or the
            layers that are left are refused by its config class, or would load as another model.
        OSError: the disk is full, or the like.
        LLMPrunerError: the edits do not lead from the dense config to this model.
    """
    model = module_of(model)
    out = expanded(out)
    dense_config = dense_config or model.config
    own, own_class = model.config, type(model)
    with atomic_directory(out, overwrite) as folder:
        try:
            model.__class__ = plain = remote_code.stock_class(own_class)
            if remote_code.is_own_code(model):
                plain._auto_class = own_class._auto_class  # has saving take the code along
            model.config, kind = _pruned_config(model, edits, dense_config)
            for part in _with_parts(model.config)[1:]:
                part.dtype = own.dtype
            if kind != "stock":
                model.__class__ = remote_code.pruned_class(type(model))
            with quiet_bars("transformers"), saved_by_shard(model) as state:
                # A shard of a model that is read block by block is in memory when it is written.
                most = (max_shard_size,) if state is None else (max_shard_size, SHARD)
                shard = min(most, key=bytes_of)
                model.save_pretrained(folder, max_shard_size=shard, state_dict=state)
                if tokenizer is not None:
                    save_tokenizer(tokenizer, folder)
            for name, content in processor.items():
                if name != "chat_template.json" or not any(folder.glob("*chat_template*")):
                    (folder / name).write_bytes(content)
        finally:
            model.config, model.__class__ = own, own_class
        if plan_json is not None:
            (folder / "plan.json").write_text(plan_json, encoding="utf-8", newline="\n")
        if beside is not None:
            beside(folder, kind, _needs(model, kind))
        make_readable(folder)
        if check is not None:
            check(folder)
    return SavedCheckpoint(kind, Path(out), folder_bytes(out), _needs(model, kind))


def make_readable(folder: Path) -> None:
    """Give the files in a folder the usual rights; safetensors makes its own private."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask())


def _needs(model: PreTrainedModel, kind: Kind) -> tuple[str, ...]:
    code = kind == "remote_code" or remote_code.is_own_code(model)
    return ("trust_remote_code=True",) if code else ()


def _pruned_config(
    model: PreTrainedModel, edits: Edits, dense_config: PreTrainedConfig
) -> tuple[PreTrainedConfig, Kind]:
    dense_config, recipe = _dense_and_recipe(model, dense_config, edits)
    stock = stock_config(dense_config, model, recipe)
    if stock is not None:
        return stock, "stock"
    depth = layer_values(meta.Trials(type(model), dense_config), recipe.layers, meta.sizes(model))
    changed = {} if depth is None else dict(depth.values)
    # The config of the outermost module is the one that later saves write.
    own = recipe.attributes.get("", ())
    rooted = [path.removeprefix("config.") for path in own if path.startswith("config.")]
    before = {path: meta.get_path(dense_config, path) for path in [*changed, *rooted]}
    recipe = _checked(model, dense_config, replace(recipe, dense_config=before), changed)
    config = meta.with_values(dense_config, changed)
    apply_recipe.require_none(config, apply_recipe.config_misfits(config, recipe))
    if changed:
        _require_valid(config)
    if edits.layers and not recipe.shapes:
        _require_no_other(config, model, edits)
    return remote_code.with_recipe(config, recipe, model), "remote_code"


def _require_valid(config: PreTrainedConfig) -> None:
    """Raise UserError if transformers refuses to read a config without the removed layers."""
    try:
        with meta.quiet_trial():
            type(config).from_dict(config.to_dict())
    except Exception as error:  # configs check themselves in any way
        said = " ".join(str(error).split())
        raise UserError(
            f"transformers refuses the config of the layers that are left ({said}), {_OTHERS}"
        ) from error


def _require_no_other(config: PreTrainedConfig, model: PreTrainedModel, edits: Edits) -> None:
    """Raise UserError if without the folder's code its weights would silently be another model."""
    if not remote_code.is_of_transformers(type(model)):
        return
    wanted = meta.sizes(model)
    built = meta.sizes(meta.build_meta(type(model), config))
    if any(what == "parameter" for what, *_ in meta.differing(built, wanted)):
        return  # which transformers says
    if accepted(config, model, wanted, edits) is None:
        raise UserError(
            f"a {type(model).__name__} computes by the places of its layers, and without the code "
            f"of the folder transformers would load another model, {_OTHERS}"
        )


def _dense_and_recipe(
    model: PreTrainedModel, config: PreTrainedConfig, edits: Edits
) -> tuple[PreTrainedConfig, Recipe]:
    """Return the config of the unpruned model and all edits since; pruned models may come again."""
    config, recipe = copy.deepcopy(config), Recipe(**vars(edits))
    data = remote_code.without_recipe_(model, config)
    packing = getattr(config, "quantization_config", None)
    if packing is not None:
        method = dict(packing).get("quant_method")
        raise UserError(
            f"the model is quantized with {getattr(method, 'value', method)}, and pruned weights "
            "cannot be saved in that form; load it without quantization"
        )
    if data is None:
        return config, recipe
    first = from_json(data)
    return meta.with_values(config, first.dense_config), compose(first, recipe)


def _checked(
    model: PreTrainedModel,
    dense_config: PreTrainedConfig,
    recipe: Recipe,
    kept_config: dict[str, Any],
) -> Recipe:
    """Apply the recipe to a model without weights; return it if the result is like ``model``.

    Numbers that modules of ``model`` hold and the recipe does not give are added to it.
    """
    recipe = replace(recipe, shapes=with_own_rows(model, recipe.shapes))
    rebuilt = meta.build_meta(type(model), dense_config)
    apply_recipe.cut_skeleton_(rebuilt, recipe, kept_config)
    apply_recipe.finish_(rebuilt, recipe)
    found, wanted = meta.sizes(rebuilt), meta.sizes(model)
    attributes = {name: dict(values) for name, values in recipe.attributes.items()}
    wrong = []
    for key in meta.differing(found, wanted):
        what, name, detail = key
        if what == "attribute":
            attributes.setdefault(name, {})[detail] = wanted[key]
        else:
            wrong.append(f"{name} dimension {detail}: {found.get(key)} for {wanted.get(key)}")
    if wrong:
        raise LLMPrunerError(
            f"the recorded edits do not rebuild the pruned model, so nothing was saved; "
            f"{len(wrong)} sizes differ: {'; '.join(sorted(wrong)[:3])}"
        )
    recipe = replace(recipe, attributes=attributes)
    apply_recipe.require_none(rebuilt, apply_recipe.attribute_misfits(rebuilt, recipe))
    return recipe


def keep_type_(network: Any, dtype: torch.dtype) -> None:
    """Turn parameters to the type in which they are saved, but for those kept in float32.

    Buffers that no checkpoint holds, such as the frequencies of rotary embeddings, keep theirs.
    """
    kept = {name for name, _ in network.named_buffers()} - set(network.state_dict())
    wide = names_in_float32(network, dtype)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name in kept or not tensor.is_floating_point():
            continue
        kind = torch.float32 if name in wide else dtype
        if not keep_dtype_(tensor, kind):
            tensor.data = tensor.data.to(kind)
    for config in _with_parts(network.config):
        config.dtype = dtype


def _with_parts(config: Any) -> list[Any]:
    """Return a config, and those of the parts of a model that takes images or sound."""
    return [config, *(one for one in vars(config).values() if isinstance(one, PreTrainedConfig))]


@contextmanager
def stored_as(network: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a model has the type in which it is saved; it then has the values it had."""
    said = [(config, config.dtype) for config in _with_parts(network.config)]
    try:
        with as_before(network):
            keep_type_(network, dtype)
            yield
    finally:
        for config, before in said:
            config.dtype = before


def round_(network: Any, dtype: torch.dtype) -> None:
    """Round weights to the type in which they will be saved; they keep the one they have."""
    types = [(one, one.dtype) for one in (*network.parameters(), *network.buffers())]
    computed = [(config, config.dtype) for config in _with_parts(network.config)]
    keep_type_(network, dtype)
    for tensor, kind in types:
        tensor.data = tensor.data.to(kind)
    for config, said in computed:
        config.dtype = said
