"""Models from a hub id, a local folder, a ``.gguf`` file, or the embedded default.

Weights are read from safetensors and GGUF only: pickles can run code. What transformers and the
code of a model raise becomes one line; see ``model_source``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    initialization,
)
from transformers.utils.hub import cached_file

from llm_pruner.errors import UserError
from llm_pruner.models import checkpoint_files as on_disk
from llm_pruner.models import gguf_file, model_source
from llm_pruner.models.forward import embedding_rows, leave_weights_
from llm_pruner.models.layers import has_recipe
from llm_pruner.models.mapped_weights import element, join_late, mapped_files
from llm_pruner.models.model_source import ModelSource, in_one_line, packing_of
from llm_pruner.models.streaming import stored, stream_
from llm_pruner.models.tokenizer import read_tokenizer
from llm_pruner.runtime.memory import free_bytes, keep_all_blocks
from llm_pruner.runtime.progress import quiet_bars
from llm_pruner.settings.common import ModelSettings

_LOG = logging.getLogger(__name__)

_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures")
_PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model with what identifies it.

    Attributes:
        model: in eval mode.
        tokenizer: None only where none was required and there is none.
        name: hub id, name of the folder, or name of the file without its ending; no path, so that
            what records it does not depend on where the model lies.
        revision: commit on the hub, if it came from there.
        fingerprint: short hash of shapes, config and a sample of the weights; see ``fingerprint``.
        stored_dtype: the type of its weights in the files; float32 for packed ones.
        processor: of a model that takes images or sound, the files that say how: name -> content.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    fingerprint: str
    stored_dtype: torch.dtype = torch.float32
    processor: Mapping[str, bytes] = field(default_factory=dict)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; raise UserError if there is none."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer, so no text can be read; add one")
        return self.tokenizer


def load(
    model: ModelSettings,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reads_tokenizer: bool | None = None,
    **options: Any,
) -> LoadedModel:
    """Return the model that the settings name; see ``load_model``. ``tokenizer``: if known."""
    loaded = load_model(
        model.model,
        reads_tokenizer=reads_tokenizer if tokenizer is None else False,
        **options,
        **model.model_dump(include={"revision", "dtype", "device", "trust_remote_code"}),
    )
    if tokenizer is None:
        return loaded
    if on_disk.local_path(model.model).suffix == ".gguf":
        gguf_file.drop_tokens_beyond_(tokenizer, embedding_rows(loaded.model))
    return replace(loaded, tokenizer=tokenizer)


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    tokenizer_required: bool = True,
    weights: bool = True,
    reads_tokenizer: bool | None = None,
    memory: int | None = None,
    resident: int | None = None,
    packed: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: hub id, local folder, ``.gguf`` file, or ``default``; without weights also a folder
            that holds only a ``config.json``.
        revision: branch, tag or commit on the hub.
        dtype: one of ``DTYPES``; ``auto`` keeps what the checkpoint has.
        device: where the model goes, such as ``cpu``, ``cuda`` or ``auto``.
        trust_remote_code: run Python code that comes with the model.
        tokenizer_required: whether a missing tokenizer is an error.
        weights: if false, the model is built on the meta device from its config, without tokenizer.
            Pruned models whose layers differ have their weights read all the same.
        reads_tokenizer: whether the tokenizer is loaded; by default where weights are.
        memory: bytes that the weights may take; larger ones are read from safetensors block by
            block, see ``stream_``.
        resident: bytes from which on they are; ``memory`` by default.
        packed: take weights that torchao or llm-compressor packed, where a model is only run.

    Raises:
        UserError: what was given cannot be loaded, in one line.
        NeedsMemory: the weights of such a model are not read block by block.
    """
    kind, device = on_disk.dtype_named(dtype), model_source.find_device(device)
    found = model_source.find_source(source, revision, trust_remote_code, weights)
    with quiet_bars("transformers"), in_one_line(source):
        config = model_source.read_config(source, found, packed)
        if weights:
            model_source.download_missing(source, found)
        reads = weights if reads_tokenizer is None else reads_tokenizer
        tokenizer = _load_tokenizer(source, found, tokenizer_required) if reads else None
    place = None
    if weights and packing_of(config) is None and not found.is_gguf:
        place = _streamed_from(found, dtype, memory, memory if resident is None else resident)
    if weights and found.is_gguf:
        _check_fits(source, kind, device)
    there = None if place is None else on_disk.commonest_type(place)
    # A weight that is cast while it is loaded is no view of its file.
    options = {"dtype": there or kind, "device_map": "cpu" if there else device}
    late = nullcontext() if place is None else join_late(partial(mapped_files, place))
    said = getattr(config, "dtype", None)  # loading may write into the config
    with quiet_bars("transformers"), in_one_line(source), late:
        model, unread = _load_model(source, found, config, options, weights)
    if unread:
        _LOG.warning(
            "%s has %s weights that no %s has, %s first: they are left out",
            *(source, f"{len(unread):,}", type(model).__name__, unread[0]),
        )
    if found.is_gguf and tokenizer is not None:
        gguf_file.drop_tokens_beyond_(tokenizer, embedding_rows(model))
    if place is not None:
        keep_all_blocks()
        kinds = (kind, said, model.dtype)
        computed = next(one for one in kinds if isinstance(one, torch.dtype))
        stream_(model, computed, device, memory or 0, folder=place)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        name=found.name,
        revision=_commit(found),
        fingerprint=fingerprint(model),
        stored_dtype=_stored_dtype(found, said),
        processor=_processor(found, model.config) if weights else {},
    )


def load_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model; raise UserError if either of them cannot be loaded."""
    found, _ = _checked(model)
    with quiet_bars("transformers"), in_one_line(model.model):
        tokenizer = _load_tokenizer(model.model, found, required=True)
    assert tokenizer is not None
    return tokenizer


def check(model: ModelSettings, *, packed: bool = False) -> Any:
    """Return the config, None for ``.gguf``; raise what ``load`` would before it reads weights."""
    return _checked(model, packed)[1]


def stored_dtype(model: ModelSettings, *, packed: bool = False) -> torch.dtype:
    """Return ``LoadedModel.stored_dtype`` of a model that is not loaded yet; else as ``check``."""
    found, config = _checked(model, packed)
    return _stored_dtype(found, getattr(config, "dtype", None))


def exceeds(model: ModelSettings, memory: int) -> bool:
    """Whether a model of safetensors needs more than ``memory`` bytes; else as ``check``."""
    found, config = _checked(model, packed=True)
    if config is None or packing_of(config) is not None:
        return False
    size = on_disk.stored_size(model.model, found.shared["revision"], model.dtype)
    return size is not None and size[1] > memory


def _checked(model: ModelSettings, packed: bool = False) -> tuple[ModelSource, Any]:
    on_disk.dtype_named(model.dtype)
    model_source.find_device(model.device)
    found = model_source.find_source(model.model, model.revision, model.trust_remote_code)
    _require_tokenizer_files(model.model, found)
    if found.is_gguf:
        return found, None
    with quiet_bars("transformers"), in_one_line(model.model):
        return found, model_source.read_config(model.model, found, packed)


def _check_fits(source: str, kind: torch.dtype | str, device: str) -> None:
    """Raise UserError if a ``.gguf`` file, which is unpacked whole, needs more than is free."""
    width = kind.itemsize if isinstance(kind, torch.dtype) else 4
    size, free = gguf_file.weights_in(on_disk.local_path(source)) * width, free_bytes(device)
    if size > free:
        raise UserError(
            f"a .gguf is unpacked whole, and {source} takes {size / 1e9:.3g} GB where "
            f"{free / 1e9:.3g} GB of memory are free; name the folder that it was made of, which "
            "is read block by block"
        )


def _streamed_from(
    found: ModelSource, dtype: str, memory: int | None, resident: int | None
) -> Path | None:
    """Return the folder from which weights are read block by block; None if they fit."""
    size = on_disk.stored_size(found.folder, found.shared["revision"], dtype)
    if size is None or resident is None or size[1] <= resident:
        return None
    _LOG.warning(
        "the weights take %.1f GB in %s and %.1f GB of memory are for them: they are read block by "
        "block",
        *(size[1] / 1e9, "their own type" if dtype == "auto" else dtype, (memory or 0) / 1e9),
    )
    return found.place


def _load_model(
    source: str, found: ModelSource, config: Any, options: dict[str, Any], weights: bool
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, and the names of weights in its files that it has no place for."""
    shared = dict(found.shared)
    if not weights and _config_suffices(config, shared):
        return without_values(config, options["dtype"], shared.get("trust_remote_code")), []
    plain = not found.is_gguf and packing_of(config) is None
    if found.is_gguf:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
        if has_recipe(config) and type(config).__module__.startswith("transformers."):
            # The class of this package does what the code of the folder does.
            shared["trust_remote_code"] = False
    # The config goes along, since parsing the header of a GGUF file takes seconds.
    model, info = AutoModelForCausalLM.from_pretrained(
        found.folder,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which only logs what they are
        use_kernels=False,  # of the hub, which nobody asked to be fetched and run
        **shared,
        **options,
    )
    if info["mismatched_keys"]:
        name, in_file, shape = min(info["mismatched_keys"])
        raise UserError(
            f"{source} has {name} in the shape {tuple(in_file)} in its weights, and of the sizes "
            f"in its config follows {tuple(shape)}; copy or download both again"
        )
    leave_weights_(model)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{source} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} "
            "first; name a complete checkpoint of a causal language model"
        )
    if found.is_gguf:
        gguf_file.require_all_read(model, Path(found.shared["gguf_file"]))
        _forget_gguf_(model)
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:  # of compressed-tensors: several weights in one integer
        compressor.decompress_model(model)  # as its first run would; till then they are miscounted
    # Of packed weights, readers take more than they say.
    return model, sorted(info["unexpected_keys"]) if plain else []


def _config_suffices(config: Any, shared: dict[str, Any]) -> bool:
    """Whether a config alone builds the model that ``from_pretrained`` would."""
    # The sizes of a pruned model that a config cannot express are in its recipe.
    if packing_of(config) is not None or has_recipe(config):
        return False
    # Without weights, code from the hub would come from its newest revision.
    own_code = shared.get("trust_remote_code") and hasattr(config, "auto_map")
    return not (own_code and shared["revision"])


def without_values(
    config: Any, dtype: torch.dtype | str, trust_remote_code: Any = None, device: str = "meta"
) -> PreTrainedModel:
    """Build a model as ``from_pretrained`` does before it reads weights: no memory on meta."""
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    with (
        initialization.no_init_weights(),
        initialization.meta_device_safe_creation_ops(),
        torch.device(device),
    ):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    # Tying is a part of the initialisation that was left out.
    model.tie_weights()
    return model


def _forget_gguf_(model: PreTrainedModel) -> None:
    """Remove the marks of the GGUF reader: the weights are plain now, and are to be saved so."""
    for mark in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        if mark in vars(model):
            delattr(model, mark)
    model.is_quantized = False
    for name in ("quantization_config", "_model_name_or_path"):
        if name in vars(model.config):
            delattr(model.config, name)


def _require_tokenizer_files(source: str, found: ModelSource) -> None:
    if not found.has_tokenizer:
        raise UserError(
            f"{source} has no tokenizer (no tokenizer.json or the like), so no text can be read; "
            "copy the tokenizer files of the original model into it"
        )


def _load_tokenizer(
    source: str, found: ModelSource, required: bool
) -> PreTrainedTokenizerBase | None:
    if not found.has_tokenizer and not required:
        return None
    _require_tokenizer_files(source, found)
    try:
        if found.is_gguf:
            with TemporaryDirectory() as empty:  # what lies beside the file may be another's
                tokenizer = AutoTokenizer.from_pretrained(empty, **found.shared)
            gguf_file.split_as_said_(tokenizer, Path(found.shared["gguf_file"]))
            return tokenizer
        return read_tokenizer(found.folder, found.shared)
    except Exception:  # tokenizer code raises whatever its parser raises
        if required:
            raise
        return None


def _commit(found: ModelSource) -> str | None:
    """Return the commit that a model of the hub was read at."""
    place = found.place
    return place.name if place is not None and place.parent.name == "snapshots" else None


def _processor(found: ModelSource, config: Any) -> dict[str, bytes]:
    """Return the files that say how images and sound become inputs, if a model takes such."""
    if found.is_gguf or not any(isinstance(one, PreTrainedConfig) for one in vars(config).values()):
        return {}
    how: dict[str, Any] = {
        "revision": _commit(found) or found.shared["revision"],
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    files = {name: cached_file(found.folder, name, **how) for name in _PROCESSOR}
    read = {name: Path(file).read_bytes() for name, file in files.items() if file is not None}
    # What names code of its own would look for that.
    return {name: content for name, content in read.items() if b'"auto_map"' not in content}


def _stored_dtype(found: ModelSource, said: Any) -> torch.dtype:
    """Return the type of stored weights: what the config said, or else that of most of them."""
    if found.is_gguf or isinstance(said, torch.dtype):
        return torch.float32 if found.is_gguf else said
    return torch.float32 if found.place is None else on_disk.commonest_type(found.place)


def fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hex digits that are equal for two loads of one model.

    SHA-256 over names, shapes and up to 8 evenly spaced elements of the parameters, rounded to
    bfloat16 so that loads of other types agree, and the config but for what changes with loading.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            with stored(parameter) as values:
                flat = getattr(values, "qdata", values)  # of packed ones
                places = range(0, flat.numel(), max(1, flat.numel() // 8))[:8]
                some = [element(flat, place) for place in places] or [flat.reshape(-1)]
                sample = torch.cat(some).to("cpu", torch.bfloat16)
                # Maybe a view of the file, whose pages it would bring back.
                digest.update(sample.view(torch.int16).numpy().tobytes())
    config = _without_volatile(model.config.to_dict())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _without_volatile(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_volatile(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _VOLATILE
    }
