"""Models from a hub id, a local folder, a ``.gguf`` file, or the embedded default.

Everything that can be wrong with what the user named is found before weights are read where that
is possible, and said in one line. Weights are read from safetensors and GGUF only: pickles can run
code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    initialization,
)
from transformers.distributed.checkpoint import is_sharded_checkpoint
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from llm_pruner.errors import UserError, in_short
from llm_pruner.files.disk import read_json
from llm_pruner.hook import has_recipe
from llm_pruner.models import stored as on_disk
from llm_pruner.models.assembled import element, put_together_late
from llm_pruner.models.explained import explained
from llm_pruner.models.forward import embedding_rows, leave_weights_
from llm_pruner.models.gguf_file import (
    complete_from_gguf_,
    drop_tokens_beyond_,
    require_all_read,
    split_as_said_,
    weights_in,
)
from llm_pruner.models.older_code import complete_
from llm_pruner.models.stored_weight import mapped_files
from llm_pruner.models.streaming import stored, stream_
from llm_pruner.models.tokenizer import read_tokenizer
from llm_pruner.models.unrounded import unrounded
from llm_pruner.runtime.memory import free_bytes, keep_all_blocks
from llm_pruner.runtime.progress import quiet_bars
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.limits import check_installed

_LOG = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "ice_text.model",
    "*.tiktoken",
    "tekken.json",
    "tokenizer_config.json",
)
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures")
_PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)
_OWN_METHOD, _PACKED_METHODS = "llm_pruner", ("torchao", "compressed-tensors")


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
        stored: what its files looked like when it was loaded; see ``file_states``.
        stored_dtype: the type of its weights there; float32 for packed ones.
        processor: of a model that takes images or sound, the files that say how: name -> content.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    fingerprint: str
    stored: on_disk.FileStates = ()
    stored_dtype: torch.dtype = torch.float32
    processor: Mapping[str, bytes] = field(default_factory=dict)

    def check_stored(self) -> None:
        """Raise UserError if its files have changed since; weights may be read from them late."""
        on_disk.check_file_states(self.stored)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; raise UserError if there is none."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer, so no text can be read; add one")
        return self.tokenizer


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
            that holds only a ``config.json``, or such a file.
        revision: branch, tag or commit on the hub.
        dtype: one of ``DTYPES``; ``auto`` keeps what the checkpoint has.
        device: where the model goes, such as ``cpu``, ``cuda`` or ``auto``.
        trust_remote_code: run Python code that comes with the model.
        tokenizer_required: whether a missing tokenizer is an error.
        weights: if false, the model is built on the meta device from its config alone, in seconds
            whatever its size, and there is no tokenizer. Models that were pruned to layers of
            different sizes have their weights read all the same.
        reads_tokenizer: whether the tokenizer is loaded; by default where weights are.
        memory: bytes that the weights may take; where they do not fit in, those of safetensors are
            read block by block, see ``stream_``.
        resident: bytes of weights, no more than ``memory``, up to which they are not; that by
            default.
        packed: take weights that torchao or llm-compressor packed, where a model is only run.

    Raises:
        UserError: anything that is wrong with what was given, in one line.
        NeedsMemory: the weights of such a model are not read block by block.
    """
    options: dict[str, Any] = {"dtype": on_disk.dtype_named(dtype), "device_map": _device(device)}
    found = _find(source, revision, trust_remote_code, tokenizer_required, weights)
    states = on_disk.file_states(source)
    with quiet_bars("transformers"), explained(source):
        config = _config(source, found, packed)
        if found.is_gguf:
            complete_from_gguf_(config, on_disk.local_path(source))
        if weights:
            _download(source, found)
    limit = memory if resident is None else resident
    in_blocks = weights and _method(config) in (None, _OWN_METHOD)
    place = None  # of what is read block by block
    if in_blocks and limit is not None and _exceeds(limit, source, revision, dtype):
        place = on_disk.stored_at(found.folder, found.shared["revision"])
    if place is not None:
        # The type of its files, whatever its config says: a weight that is cast is no view of them.
        there = on_disk.commonest_type(place)
        options = {"dtype": there, "device_map": "cpu"}
    with quiet_bars("transformers"):
        with explained(source):
            of_model = found
            if has_recipe(config) and type(config).__module__.startswith("transformers."):
                # The class of this package does what the code of the folder does.
                of_model = replace(found, shared=found.shared | {"trust_remote_code": False})
            said = getattr(config, "dtype", None)  # what loads may write into the config
            late = None if place is None else put_together_late(partial(mapped_files, place))
            with late or nullcontext():
                model, unread = _load_model(source, of_model, config, options, weights)
        reads = weights if reads_tokenizer is None else reads_tokenizer
        tokenizer = _load_tokenizer(source, found, tokenizer_required) if reads else None
    if unread:
        _LOG.warning(
            "%s has %s weights that no %s has, %s first: they are left out",
            source,
            f"{len(unread):,}",
            type(model).__name__,
            unread[0],
        )
    if found.is_gguf and tokenizer is not None:
        drop_tokens_beyond_(tokenizer, embedding_rows(model))
    if place is not None:
        keep_all_blocks()
        kinds = (on_disk.dtype_named(dtype), said, model.dtype)
        kind = next(one for one in kinds if isinstance(one, torch.dtype))
        exact = unrounded(source, model, place, there, kind, unread)
        ranges = mapped_files(place)
        stream_(model, kind, _device(device), memory or 0, ranges=ranges, unrounded=exact)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        name=found.name,
        revision=_commit(found),
        fingerprint=fingerprint(model),
        stored=states,
        stored_dtype=_stored_dtype(found, said),
        processor=_processor(found, model.config) if weights else {},
    )


def _commit(found: _Found) -> str | None:
    """Return the commit that a model of the hub was read at."""
    place = on_disk.stored_at(found.folder, found.shared.get("revision"))
    return place.name if place is not None and place.parent.name == "snapshots" else None


def _processor(found: _Found, config: Any) -> dict[str, bytes]:
    """Return the files that say how images and sound become inputs, if a model takes such."""
    parts = (one for one in vars(config).values() if isinstance(one, PreTrainedConfig))
    if found.is_gguf or not any(parts):
        return {}
    how: dict[str, Any] = {
        "revision": _commit(found) or found.shared["revision"],
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        files = {name: cached_file(found.folder, name, **how) for name in _PROCESSOR}
        read = {name: Path(file).read_bytes() for name, file in files.items() if file is not None}
    except OSError:  # a cache that cannot be written to, or the like
        return {}
    # What names code of its own would look for that.
    return {name: content for name, content in read.items() if b'"auto_map"' not in content}


def _stored_dtype(found: _Found, said: Any) -> torch.dtype:
    """Return the type of stored weights: what the config said, or else that of most of them."""
    if found.is_gguf or isinstance(said, torch.dtype):
        return torch.float32 if found.is_gguf else said
    place = on_disk.stored_at(found.folder, found.shared["revision"])
    return torch.float32 if place is None else on_disk.commonest_type(place)


def _config(source: str, found: _Found, packed: bool) -> Any:
    """Read a config, and refuse what would be loaded as something else than it is."""
    if here := Path(found.folder).exists():
        _check_adapter(source, found)
    try:
        config = AutoConfig.from_pretrained(found.folder, **found.shared)
    except Exception:
        if not here and find_adapter_config_file(found.folder, revision=found.shared["revision"]):
            raise _lone_adapter(source) from None
        raise
    both = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    either = config.model_type in both and not config.is_encoder_decoder
    if either and getattr(config, "is_decoder", None) is False:
        raise UserError(
            f"{source} is an encoder ({config.model_type}): each token sees those behind it; name "
            "a model that generates text"
        )
    _check_quantization(source, config, packed)
    if named := getattr(config, "transformers_weights", None):
        raise UserError(
            f"{source} has its weights in {named!r}, says its config.json (transformers_weights), "
            "and only files of the usual names are read; load it with transformers and save it anew"
        )
    if not here:
        _check_adapter(source, found)
    return config


def _check_adapter(source: str, found: _Found) -> None:
    """Raise UserError if transformers would load an adapter too, from wherever that says."""
    folder, revision = found.folder, found.shared.get("revision")
    if not Path(folder).is_file() and find_adapter_config_file(folder, revision=revision):
        raise UserError(
            f"{source} has an adapter beside its weights ({_ADAPTER}); merge it into them with "
            "merge_and_unload of peft, or move it away"
        )


def _download(source: str, found: _Found) -> None:
    """Fetch a model of the hub whose size is not known: it says how the weights are read."""
    revision = found.shared.get("revision")
    of_hub = found.folder == source and not on_disk.local_path(source).exists()
    if of_hub and on_disk.stored_size(source, revision, "auto") is None:
        on_disk.download(source, revision, found.shared["trust_remote_code"])


def exceeds(model: ModelSettings, memory: int) -> bool:
    """Whether a model here that is read by blocks, so not ``.gguf``, needs more memory than that.

    Raises UserError: it cannot be loaded, or a weight file is damaged.
    """
    config = check(model, packed=True)
    if config is None or _method(config) not in (None, _OWN_METHOD):
        return False
    size = _bytes_by_block(model.model, model.revision, model.dtype)
    return size is not None and size > memory


def check_memory(model: ModelSettings, memory: int | str) -> None:
    """Raise UserError if a ``.gguf`` file, unpacked as a whole, needs more than ``memory``.

    With ``auto``, nobody having said, what is free is compared, and only warned of.
    """
    file = on_disk.local_path(model.model)
    if file.suffix != ".gguf" or not file.is_file():
        return
    kind = "float32" if model.dtype == "auto" else model.dtype
    size = weights_in(file) * getattr(torch, kind).itemsize
    room = free_bytes(model.device) if isinstance(memory, str) else memory
    if size <= room:
        return
    said = f"a .gguf is unpacked whole, and {model.model} takes {size / 1e9:.3g} GB in {kind}"
    if not isinstance(memory, str):
        raise UserError(
            f"{said}, more than the {room / 1e9:.3g} GB of --memory; name the folder that it was "
            "made of, which is read block by block, or give more"
        )
    _LOG.warning("%s, and %.3g GB of memory are free", said, room / 1e9)


def _bytes_by_block(source: str, revision: str | None, dtype: str) -> int | None:
    """Return the bytes of weights that can be read block by block, where they are known."""
    size = on_disk.stored_size(source, revision, dtype)
    return None if size is None or size[0] is None else size[1]


def _exceeds(memory: int, source: str, revision: str | None, dtype: str) -> bool:
    """Whether a model is read block by block, which is said."""
    size = _bytes_by_block(source, revision, dtype)
    if size is None or size <= memory:
        return False
    _LOG.warning(
        "the weights take %.1f GB in %s and %.1f GB of memory are for them: they are read block by "
        "block",
        size / 1e9,
        "their own type" if dtype == "auto" else dtype,
        memory / 1e9,
    )
    return True


@dataclass(frozen=True)
class _Found:
    """Where a model is read from.

    Attributes:
        folder: what ``from_pretrained`` is given: a folder, a file with a config, or a hub id.
        name: as ``LoadedModel.name``.
        shared: what config, weights and tokenizer are loaded with.
        has_tokenizer: false where it is known that there is none.
    """

    folder: str
    name: str
    shared: dict[str, Any]
    has_tokenizer: bool = True

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.shared


def _find(
    source: str,
    revision: str | None,
    trust_remote_code: bool,
    tokenizer_required: bool = True,
    weights: bool = True,
) -> _Found:
    """Return where a model is read from, after checks that need no weights; or UserError."""
    if revision == "":
        raise UserError("--revision is empty; name a branch, tag or commit, or leave it out")
    if not source:
        raise UserError("the name of the model is empty; give a folder, a .gguf file or a hub id")
    path = on_disk.local_path(source)
    if revision is not None and path.exists():
        raise UserError(
            f"--revision {revision} is of models on the hub, and {source} is on this machine; "
            "leave it out"
        )
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf" and not path.is_dir():
        _check_gguf(path)
        # By its whole path: transformers takes a file of that name in the current folder first.
        return _Found(str(path.parent), path.stem, {"gguf_file": str(path.absolute())})
    if path.is_dir():
        _check_folder(path, weights)
        there = any(next(path.glob(pattern), None) for pattern in _TOKENIZERS)
        if weights and tokenizer_required and not there:
            raise UserError(
                f"{path} has no tokenizer (no {_TOKENIZERS[0]} or the like), so no text can be "
                "read; copy the tokenizer files of the original model into it"
            )
        return _Found(str(path), on_disk.name_of(path), shared, there)
    if path.suffix == ".json" and path.is_file():
        if weights:
            raise UserError(
                f"{source} is a config without weights; name the folder of a checkpoint"
            )
        _check_json(path)
        name = path.resolve().parent.name if path.name == on_disk.CONFIG else path.stem
        return _Found(str(path), name, shared, has_tokenizer=False)
    _check_hub_id(source, path)
    return _Found(source, source, shared)


def fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hex digits that are equal for two loads of one model.

    SHA-256 over the name and shape of each parameter, the config without values that change from
    load to load, and, where there are weights, up to 8 evenly spaced elements of each parameter,
    rounded to bfloat16 so that float32 and bfloat16 loads agree.
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


def _load_model(
    source: str, found: _Found, config: Any, options: dict[str, Any], weights: bool
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, and the names of weights in its files that it has no place for."""
    if not weights:
        if _config_suffices(config, found.shared):
            trusts = found.shared.get("trust_remote_code")
            return without_values(config, options["dtype"], trusts), []
        if Path(found.folder).is_file():
            raise UserError(
                f"{source} is the config of a model whose layers differ, and their sizes are read "
                "with its weights; name its folder"
            )
        if Path(found.folder).is_dir():
            on_disk.stored_tensors(Path(found.folder))
    plain = not found.is_gguf and _method(config) is None
    if plain and (place := on_disk.stored_at(found.folder, found.shared["revision"])) is not None:
        on_disk.check_types(place)
    if found.is_gguf:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    # The config goes along, since parsing the header of a GGUF file takes seconds.
    model, info = AutoModelForCausalLM.from_pretrained(
        found.folder,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which only logs what they are
        use_kernels=False,  # of the hub, which nobody asked to be fetched and run
        **found.shared,
        **options,
    )
    if info["mismatched_keys"]:
        name, stored_shape, shape = min(info["mismatched_keys"])
        has = f"{source} has {name} in the shape {tuple(stored_shape)} in its weights, and of"
        if found.is_gguf:
            raise UserError(
                f"{has} the sizes that transformers reads in it follows {tuple(shape)}; name the "
                "folder that it was made of"
            )
        raise UserError(
            f"{has} its config.json follows {tuple(shape)}; copy or download both again"
        )
    complete_(model, config)
    leave_weights_(model)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} "
            "first; name a complete checkpoint of a causal language model"
        )
    if found.is_gguf:
        require_all_read(model, Path(found.shared["gguf_file"]))
        _forget_gguf_(model)
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:  # of compressed-tensors: several weights in one integer
        compressor.decompress_model(model)  # as its first run would; till then they are miscounted
    # Of packed weights, readers take more than they say.
    return model, sorted(info["unexpected_keys"]) if plain else []


def _config_suffices(config: Any, shared: dict[str, Any]) -> bool:
    """Whether a config alone builds the model that ``from_pretrained`` would."""
    # The sizes of a pruned model that a config cannot express are in its recipe.
    if getattr(config, "quantization_config", None) is not None or has_recipe(config):
        return False
    # Without weights, code from the hub would come from its newest revision.
    own_code = shared.get("trust_remote_code") and hasattr(config, "auto_map")
    return not (own_code and shared.get("revision"))


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


def _load_tokenizer(source: str, found: _Found, required: bool) -> PreTrainedTokenizerBase | None:
    if not found.has_tokenizer:
        return None
    try:
        if found.is_gguf:
            with TemporaryDirectory() as empty:  # what lies beside the file may be another's
                tokenizer = AutoTokenizer.from_pretrained(empty, **found.shared)
            split_as_said_(tokenizer, Path(found.shared["gguf_file"]))
            return tokenizer
        return read_tokenizer(found.folder, found.shared)
    except Exception as error:  # tokenizer code raises whatever its parser raises
        if not required:
            return None
        if found.is_gguf:  # no file beside it would help
            with explained(source):
                raise
        raise UserError(
            f"the tokenizer of {source} cannot be loaded ({in_short(error)}); "
            "put the tokenizer files of the original model beside the weights"
        ) from error


def _check_hub_id(source: str, path: Path) -> None:
    if path.exists():
        raise UserError(
            f"{source} is a file that is no .gguf; name a folder, a .gguf file or a hub id"
        )
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise UserError(
            f"{source} does not exist; name a folder with config.json and safetensors, "
            "a .gguf file, a hub id, or 'default'"
        )


def _check_folder(path: Path, weights: bool) -> None:
    """Raise UserError unless a folder has a readable config and, if asked, complete weights."""
    if not (path / on_disk.CONFIG).is_file():
        if (path / _ADAPTER).is_file():
            raise _lone_adapter(str(path))
        raise UserError(
            f"{path} has no config.json, so it is no checkpoint; name a folder that "
            "save_pretrained wrote"
        )
    _check_json(path / on_disk.CONFIG)
    if weights and is_sharded_checkpoint(path):
        raise UserError(
            f"{path} has the shards of a training run (shard-...), which would be read in place of "
            "its weights; join them with transformers, or move them away"
        )
    if weights:
        on_disk.stored_tensors(path)


def _lone_adapter(source: str) -> UserError:
    return UserError(
        f"{source} is an adapter without its model ({_ADAPTER}); merge it into that with "
        "merge_and_unload of peft, and name what that saves"
    )


def _check_json(config: Path) -> None:
    try:
        read_json(config)
    except ValueError as error:
        raise UserError(
            f"{config} is not valid JSON ({error}); restore it from the original checkpoint"
        ) from error


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a .gguf file, a folder or a hub id")
    with path.open("rb") as stream:
        start = stream.read(4)
    if start != b"GGUF":
        raise UserError(
            f"{path} is no GGUF file (it starts with {start!r}); copy or download it again"
        )


def _method(config: Any) -> str | None:
    """Return how weights are packed; a pruned folder's recipe stands in that place, too."""
    for one in (config, config.get_text_config(decoder=True)):
        quantization = getattr(one, "quantization_config", None)
        if quantization is not None:
            return str(dict(quantization).get("quant_method", ""))
    return None


def _check_quantization(source: str, config: Any, packed: bool) -> None:
    method = _method(config)
    if method in _PACKED_METHODS and packed:
        check_installed(f"{source} is packed by {method}, and", (method.replace("-", "_"),))
    elif method not in (None, _OWN_METHOD, "gguf"):
        run = "can only be run, by evaluate, chat and bench"
        raise UserError(
            f"{source} is quantized ({method}), and its packed weights "
            f"{run if method in _PACKED_METHODS else 'are not read'}; name the original checkpoint"
        )


def _device(name: str) -> str:
    """Return the device of a name.

    ``auto`` is one GPU. That of accelerate spreads a model over all there are, and what they cannot
    hold over the memory, where hooks move it as it is called: no pass block by block sees through
    them. It also takes Apple's GPU, which knows no float64.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Sums are taken in float64.
        if torch.empty(1, dtype=torch.float64, device=torch.device(name)).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"device {name!r} cannot be used here ({in_short(error)}); use cpu or one that is there"
        ) from error
    return name


def load(
    model: ModelSettings,
    *,
    tokenizer_required: bool = True,
    weights: bool = True,
    reads_tokenizer: bool | None = None,
    memory: int | None = None,
    resident: int | None = None,
    packed: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LoadedModel:
    """Return the model that the settings name; without ``weights``, from its config alone.

    Args:
        reads_tokenizer, memory, resident, packed: see ``load_model``.
        tokenizer: of the model, if it was read before.

    Raises:
        UserError: it cannot be loaded.
    """
    loaded = load_model(
        model.model,
        tokenizer_required=tokenizer_required,
        weights=weights,
        reads_tokenizer=reads_tokenizer if tokenizer is None else False,
        memory=memory,
        resident=resident,
        packed=packed,
        **model.model_dump(include={"revision", "dtype", "device", "trust_remote_code"}),
    )
    if tokenizer is None:
        return loaded
    if (place := on_disk.local_path(model.model)).suffix == ".gguf" and place.is_file():
        drop_tokens_beyond_(tokenizer, embedding_rows(loaded.model))
    return replace(loaded, tokenizer=tokenizer)


def load_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model; raise UserError if either of them cannot be loaded."""
    found, _ = _checked(model)
    with quiet_bars("transformers"):
        tokenizer = _load_tokenizer(model.model, found, required=True)
    assert tokenizer is not None
    return tokenizer


def check(model: ModelSettings, *, packed: bool = False) -> Any:
    """Refuse what ``load`` would refuse before it reads weights, of models loaded late in a run.

    Returns the config; None of a .gguf file, where it lies behind a vocabulary that takes seconds.
    """
    return _checked(model, packed)[1]


def stored_dtype(model: ModelSettings, *, packed: bool = False) -> torch.dtype:
    """Return ``LoadedModel.stored_dtype`` of a model that is not loaded yet; else as ``check``."""
    found, config = _checked(model, packed)
    return _stored_dtype(found, getattr(config, "dtype", None))


def _checked(model: ModelSettings, packed: bool = False) -> tuple[_Found, Any]:
    on_disk.dtype_named(model.dtype)
    _device(model.device)
    found = _find(model.model, model.revision, model.trust_remote_code)
    if found.is_gguf:
        return found, None
    with quiet_bars("transformers"), explained(model.model):
        return found, _config(model.model, found, packed)
