"""How a language model is run: arguments, longest input, logits, and steps with a cache."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llm_pruner.errors import DiscoveryError, UserError, require_kind

_STATES = re.compile("hidden|state|cache|key|attention|mem")

_needs_targets: WeakSet[nn.Module] = WeakSet()


def module_of(model: Any) -> nn.Module:
    """Return the network of what ``load`` returned, or a module as it is; UserError for others."""
    for held in ("network", "model"):
        if not isinstance(model, nn.Module):
            model = getattr(model, held, model)
    require_kind("model", model, nn.Module, "what load returned, or an nn.Module")
    return model


def token_ids(given: Any, model: nn.Module) -> torch.Tensor:
    """Return the token ids in a tensor, an array or lists, shape (samples, tokens).

    Raises:
        UserError: they are of another shape, or none of the model's tokens.
    """
    # Whatever the default device is.
    ids = given if isinstance(given, torch.Tensor) else torch.as_tensor(given, device="cpu")
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(
            f"token ids of shape {tuple(ids.shape)} and type {ids.dtype} cannot be read; give "
            "integers of shape (samples, tokens)"
        )
    ids = ids.long()
    table = getattr(input_embedding(model), "weight", None)
    least, most = (int(one) for one in torch.aminmax(ids)) if ids.numel() else (0, 0)
    if table is not None and not 0 <= least <= most < len(table):
        raise UserError(
            f"token ids run from {least} to {most} and the model has {len(table)} tokens; use the "
            "tokenizer that belongs to the model"
        )
    return ids


def find_logits(output: Any, depth: int = 3) -> torch.Tensor | None:
    """Return the logits of a model's output, or None.

    They are the output itself, its ``logits``, or the first tensor of real numbers in a tuple,
    list, mapping or object that is neither a single number (a loss) nor, by its name, a state.

    Args:
        depth: how many of them may be nested.
    """
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() and output.dim() > 1 else None
    if isinstance(output, Mapping):
        parts = dict(output)
    elif hasattr(output, "_asdict"):
        parts = output._asdict()
    elif isinstance(output, tuple | list):
        parts = dict(enumerate(output))
    else:
        parts = dict(getattr(output, "__dict__", {}))
    rest = [part for name, part in parts.items() if not _STATES.search(str(name))]
    for part in [parts.get("logits", getattr(output, "logits", None)), *rest] if depth else ():
        found = find_logits(part, depth - 1)
        if found is not None:
            return found
    return None


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of an output; DiscoveryError if there are none."""
    if (logits := find_logits(output)) is None:
        raise DiscoveryError(f"the model returns {type(output).__name__} without logits")
    return logits


def run_for_logits(
    model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Run a model and return the logits of all positions, shape (samples, seq_len, vocabulary).

    Args:
        input_ids: shape (samples, seq_len).
        positions: those whose logits are wanted, of a model that `gives_chosen`.

    Raises:
        UserError: there are no logits of three dimensions, or not of all positions.
    """
    # nanoGPT gives all logits beside a loss, and otherwise those of the last position alone.
    targets = {"targets": input_ids} if model in _needs_targets else {}
    chosen = {} if positions is None else {"logits_to_keep": positions}
    output = model(input_ids, **targets, **chosen)
    logits = find_logits(output)
    wanted = input_ids.shape[1] if positions is None else len(positions)
    fewer = logits is not None and logits.ndim == 3 and logits.shape[1] < wanted
    if fewer and not targets and "targets" in parameters_of(model):
        _needs_targets.add(model)
        return run_for_logits(model, input_ids)
    if logits is None or logits.ndim != 3 or logits.shape[1] != wanted:
        raise UserError(
            f"the model returns {type(output).__name__} without logits of shape (samples, seq_len, "
            "vocabulary), so it has no loss; let it return those of all positions"
        )
    return logits


def gives_chosen(model: nn.Module) -> bool:
    """Whether a model takes the positions whose logits are wanted, as those of transformers do."""
    return "logits_to_keep" in parameters_of(model)


def base_model(model: nn.Module) -> nn.Module:
    """Return the model that a wrapper with adapters (PEFT) hands its arguments to."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's forward pass by name."""
    return inspect.signature(base_model(model).forward).parameters


def cache_argument(model: nn.Module) -> str | None:
    """Return the name of the argument and output field that holds the cache, if there is one."""
    names = parameters_of(model)
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def first_tensor(given: Iterable[Any], named: Mapping[str, Any]) -> torch.Tensor:
    """Return what a module reads: the first tensor that it is given, by place or by name."""
    return next(one for one in (*given, *named.values()) if isinstance(one, torch.Tensor))


def caching(model: nn.Module, wanted: bool) -> dict[str, bool]:
    """Return the argument that says whether a cache is made; none where the model takes none."""
    return {"use_cache": wanted} if takes(model, "use_cache") else {}


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward pass takes an argument of this name, or any."""
    names = parameters_of(model)
    return argument in names or any(one.kind is one.VAR_KEYWORD for one in names.values())


def maximum_length(model: Any) -> int | None:
    """Return the longest input that the model's config allows, None where it sets no limit."""
    config: Any = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    text = text_config() if callable(text_config) else config
    found = [
        value
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "block_size")
        if type(value := getattr(text, name, None)) is int and value > 0
    ]
    return min(found, default=None)


def check_length(model: Any, seq_len: int) -> None:
    """Raise UserError if samples are longer than what the model reads."""
    longest = maximum_length(model)
    if longest is not None and seq_len > longest:
        raise UserError(
            f"seq_len {seq_len} is longer than the model's maximum; use {longest} or less"
        )


def embedding_rows(model: Any) -> int:
    """Return the number of rows of the input embedding, that is of token ids."""
    embedding = input_embedding(model)
    if embedding is None:
        raise UserError(
            f"{type(model).__name__} does not say in which table tokens are looked up; have its "
            "get_input_embeddings return that"
        )
    return int(embedding.weight.shape[0])


def input_embedding(model: Any) -> Any:
    """Return the module that token ids are looked up in; None where the model does not say."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def dtype_name(model: Any) -> str:
    """Return the name of the type that a model computes in: that of its first weight."""
    first = next(one for one in model.parameters() if one.is_floating_point())
    return str(first.dtype).removeprefix("torch.")


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model has parameters without values."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode for the time of the context."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, no parameter requires a gradient, no cache. Outside: nothing changed.

    ``.grad`` is never touched, because gradients are taken with ``torch.autograd.grad``.
    """
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caches = [(c, c.use_cache) for c in configs.values() if hasattr(c, "use_cache")]
    try:
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        for config, _ in caches:
            config.use_cache = False
        with evaluating(model):
            yield
    finally:
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for config, value in caches:
            config.use_cache = value


@contextmanager
def own_forward(*modules: nn.Module) -> Iterator[None]:
    """Give modules their forward pass back at the end, also after what accelerate makes of it."""
    names = ("forward", "_original_forward")
    before = [{name: vars(one)[name] for name in names if name in vars(one)} for one in modules]
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(own)


def leave_weights_(model: nn.Module) -> None:
    """Have a model compute with its weights as they are.

    RWKV divides those of later blocks in place while it is not in training, so that what is saved
    would be another model, and models that share weights would not know.
    """
    for module in model.modules():
        if hasattr(module, "_rescale_layers"):
            vars(module)["_rescale_layers"] = lambda: None


class Decoder:
    """Runs a model over a growing text, without the defaults of its generation config.

    Attributes:
        cache: what the model keeps of the text so far; None before the first step, and always for
            a model without a cache.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self._argument = cache_argument(model)
        self._fixed = {"logits_to_keep": 1} if "logits_to_keep" in parameters_of(model) else {}
        self._seen: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens, shape (batch, T), and return the logits of the last one, (batch, V)."""
        if self.cache is None:
            # No cache yet, or a model without one: run the whole text again.
            self._seen = tokens if self._seen is None else torch.cat([self._seen, tokens], dim=1)
            tokens = self._seen
        keywords = {self._argument: self.cache, "use_cache": True} if self._argument else {}
        output = self.forward(input_ids=tokens, **keywords, **self._fixed)
        self.cache = getattr(output, self._argument, None) if self._argument else None
        return output.logits[:, -1]

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        return self.model(**inputs)


def tensor_bytes(holder: Any) -> int:
    """Return the bytes of all tensors that an object holds, at any depth; each counts once."""
    seen: set[int] = set()
    total = 0
    pending = [holder]
    while pending:
        item = pending.pop()
        if item is None or isinstance(item, (str, bytes, int, float, type)) or id(item) in seen:
            continue
        seen.add(id(item))
        if is_traceable_wrapper_subclass(item):  # such as packed weights with their scales
            pending.extend(getattr(item, name) for name in item.__tensor_flatten__()[0])
        elif isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            pending.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, torch.nn.Module):
            pending.extend(vars(item).values())
    return total


def make_room_(cache: Any, tokens: int) -> None:
    """Have the layers of a cache take the next tokens in place, up to ``tokens`` in all.

    A layer of transformers' ``DynamicCache`` copies its keys and values at each step. Other layers
    are left as they are. The texts may only grow.
    """
    layers = getattr(cache, "layers", None)
    if isinstance(layers, list):
        layers[:] = [
            _Roomy(one, tokens) if type(one) is DynamicLayer and one.get_seq_length() else one
            for one in layers
        ]


def repeat_(cache: Any, texts: int) -> bool:
    """Have so many texts go on from one cache of keys and values; return whether that can be."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or vars(cache).keys() != vars(DynamicCache()).keys():
        return False
    if not cache.layers or any(type(one) not in plain for one in cache.layers):
        return False
    cache.batch_repeat_interleave(texts)
    return True


class _Roomy(DynamicLayer):
    """A layer whose keys and values are the filled part of longer (batch, heads, tokens, size)."""

    def __init__(self, filled: DynamicLayer, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self._rooms = tuple(
            one.new_empty(*one.shape[:-2], max(tokens, one.shape[-2]), one.shape[-1])
            for one in (filled.keys, filled.values)
        )
        self.update(filled.keys, filled.values)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write behind what is there; beyond the room, grow as the layer does otherwise."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._rooms[0].shape[-2]:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._rooms
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values
