"""Scenes: the ways in which a model is run to trace it and to compare it with its twin.

Eight tokens do not reach all of a model's code: a window matters beyond its length, a table grows
with the input, the config sizes a cache, training takes other branches. So a model runs on short
and long input, with its cache, with padding, and in training mode without dropout.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from llm_pruner.models.forward import (
    base_model,
    caching,
    logits_of,
    maximum_length,
    parameters_of,
)
from llm_pruner.models.layers import held_in, is_settings
from llm_pruner.tracing.provenance import put_back, spaces_of

Forward = Callable[[nn.Module, torch.Tensor], list[torch.Tensor]]
"""Runs the model on token ids (batch, sequence); returns every logits tensor it computes."""

LONGEST = 1024
"""Tokens of the longest input, however small the model."""

OPERATIONS = 1.2e12
"""Floating-point operations of one run on long input, which bound it in large models."""

_NEW_TOKENS = 2
_LONG = 40  # tokens of the shortest long input
_POSITIONS = 128  # of a long input whose logits are compared
_GENERATES = " and generate"  # the name of a scene through ``generate`` ends so
_RANDOM = re.compile("drop|jitter|noise", re.IGNORECASE)


@dataclass(frozen=True)
class Scene:
    """One way in which a model is run.

    Attributes:
        name: shown to users.
        shape: batch and sequence of the token ids.
        run: runs the model on such token ids.
        training: whether in training mode.
        needed: whether a model that cannot run so is refused.
        vocabulary: number of token ids.
        tokens: token ids instead of random ones.
    """

    name: str
    shape: tuple[int, int]
    run: Forward
    training: bool = False
    needed: bool = False
    vocabulary: int = 0
    tokens: torch.Tensor | None = field(default=None, compare=False)


def scenes_of(
    model: nn.Module, forward: Forward, vocabulary: int, tokens: torch.Tensor | None = None
) -> tuple[Scene, ...]:
    """Return the scenes of a model.

    ``forward`` runs the first scene, on ``tokens`` or random ones; also the others if the model is
    not of ``transformers``.
    """
    length, beyond = long_length(model, vocabulary)
    said = f"{length:,} tokens" + (f" (not {beyond:,})" if beyond else "")
    named = is_of_transformers(model)
    run = _by_name if named else forward
    padded = Scene("padding left and right", (2, 8), _padded)
    long = Scene(said, (1, length), run)
    if named and hasattr(model, "generate"):
        long = Scene(f"{said}{_GENERATES}", (1, length), generated)
    first = Scene("8 tokens", (2, 8), forward, needed=True)
    if tokens is not None:
        samples, count = tokens.shape
        first = replace(first, name="the given tokens", shape=(samples, count), tokens=tokens)
    scenes = (
        first,
        *([padded] if named and "attention_mask" in parameters_of(model) else []),
        long,
        *([] if named else [Scene("1 token", (2, 1), run)]),
        Scene("training", (2, 7), run, training=True),
    )
    return tuple(replace(scene, vocabulary=vocabulary) for scene in scenes)


def instead(scene: Scene) -> Iterator[Scene]:
    """Yield scenes with fewer tokens, then without ``generate``, to try if a long scene fails."""
    length = scene.shape[1]
    if length < _LONG or scene.tokens is not None:
        return
    for fewer in dict.fromkeys((length - 1, length // 2, length // 4, _LONG)):
        name = scene.name.replace(f"{length:,} tokens", f"{fewer:,} tokens", 1)
        yield replace(scene, name=name, shape=(scene.shape[0], fewer))
    if scene.run is generated:
        plain = replace(scene, name=scene.name.removesuffix(_GENERATES), run=_by_name)
        yield plain
        yield from instead(plain)


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is run like those of ``transformers``: by keywords, with a cache."""
    own = isinstance(base_model(model), PreTrainedModel)
    return own or {"input_ids", "use_cache"} <= set(parameters_of(model))


def long_length(model: nn.Module, vocabulary: int) -> tuple[int, int | None]:
    """Return the length of the long input, and the length that a larger window needs (or None).

    It exceeds every window, table and number in the model, within the limits ``LONGEST``,
    ``OPERATIONS`` and the model's own positions.
    """
    held = {size for size in _numbers(model) if 8 < size != vocabulary}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bound = int(max(64, min(LONGEST, OPERATIONS / (2 * max(parameters, 1)))))
    positions = maximum_length(model)
    if positions is not None:
        bound = min(bound, positions)
    length = max((size + 1 for size in held if size < bound), default=0)
    length = min(bound, max(length, 128))
    # Odd, so that it is no multiple of a chunk size.
    length += (1 if length < bound else -1) * (length % 2 == 0)
    windows = [
        size
        for _, name, size in _held(model)
        if type(size) is int and "window" in name and size >= length
    ]
    return length, (max(windows) + 1 if windows else None)


def _held(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, value) of all attributes of modules and their configs."""
    for module in model.modules():
        for key, value in [*vars(module).items()]:
            yield module, key, value
            if is_settings(key, value):
                yield from ((value, inner, item) for inner, item in [*vars(value).items()])


def _numbers(model: nn.Module) -> Iterator[int]:
    """Yield the integers in modules, configs and code outside of libraries, and sizes of tables."""
    for owner, _, value in _held(model):
        if type(value) is int:
            yield value
        elif isinstance(owner, nn.Module) and isinstance(value, torch.Tensor):
            yield from value.shape
        elif isinstance(owner, nn.Module):
            yield from held_in(value, int)
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        if not kind.__module__.startswith(("torch.", "transformers.", "builtins")):
            yield from _in_code(kind)
    for buffer in model.buffers():
        yield from buffer.shape
    yield from (one.num_embeddings for one in model.modules() if isinstance(one, nn.Embedding))


def _in_code(kind: type) -> Iterator[int]:
    """Yield the integers in the code of a class, and in the names of its file that it uses."""
    space = getattr(sys.modules.get(kind.__module__), "__dict__", {})
    pending: list[Any] = [one for key, one in vars(kind).items() if not key.startswith("__")]
    seen: set[int] = set()
    while pending:
        value = inspect.unwrap(pending.pop())
        yield from held_in(value, int)
        if inspect.isfunction(value) and value.__module__ == kind.__module__:
            pending += [value.__defaults__, value.__kwdefaults__, value.__code__]
        elif inspect.iscode(value) and id(value) not in seen:
            seen.add(id(value))
            pending += [
                *value.co_consts,
                *(space[name] for name in value.co_names if name in space),
            ]


def few(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits at some evenly spaced positions and the last; (batch, few, ...)."""
    count = logits.shape[1]
    if logits.dim() < 3 or count <= _POSITIONS:
        return logits
    return logits[:, (count - 1) % math.ceil(count / _POSITIONS) :: math.ceil(count / _POSITIONS)]


def _by_name(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    return [logits_of(model(input_ids=tokens, **caching(model, False)))]


def _padded(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run a batch whose first row is padded left and whose second is padded right."""
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    mask[1, -3:] = 0
    logits = logits_of(model(input_ids=tokens, attention_mask=mask, **caching(model, False)))
    if logits.shape[1] != tokens.shape[1]:
        return [logits]
    return [logits[0:1, 3:], logits[1:2, :-3]]


class _Forced(LogitsProcessor):
    """Forces the same continuation on every model."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # noqa: ARG002
        forced = torch.full(tuple(scores.shape), float("-inf"), dtype=scores.dtype, device="cpu")
        forced[:, self.tokens.pop(0)] = 0.0
        return forced.to(scores.device)  # type: ignore[return-value]


def generated(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run ``generate``, forced to continue as ``tokens``; (batch, vocabulary) per new token."""
    prompt, new = tokens[:, :-_NEW_TOKENS], tokens[0, -_NEW_TOKENS:]
    with redirect_stdout(StringIO()):  # some models print
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([_Forced(new.tolist())]),
        )
    return list(found.logits)


@contextmanager
def staged(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Switch to evaluation, or to training without dropout, without gradients or hub kernels.

    Restores what modules hold afterwards: states, tables, and the values of buffers.
    """
    modes = [(module, module.training) for module in model.modules()]
    random = list(_random_parts(model)) if training else []
    spaces = [*spaces_of(model), *(space for space, _ in random)]
    values = [
        (value, value.clone())
        for space in spaces
        for value in space.values()
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
        if _has_values(value)
    ]
    try:
        with put_back(spaces), torch.no_grad():
            for space, key in random:
                space[key] = 0.0
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


class Unwritten(TorchDispatchMode):
    """Restores parameters that the model's code writes into, also by ``.data``."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own: dict[int, list[tuple[str, torch.Tensor]]] = defaultdict(list)
        for name, weight in model.named_parameters():
            if _has_values(weight):
                self._own[storage_of(weight)].append((name, weight))
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for tensor in (*args, *(kwargs or {}).values()):
                if isinstance(tensor, torch.Tensor):
                    written = self._own.pop(storage_of(tensor), ())
                    self._kept += [(one, one.detach().clone()) for _, one in written]
                    _written.update(_key(name) for name, _ in written)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        with torch.no_grad():
            for weight, value in self._kept:
                if not torch.equal(weight, value):
                    weight.copy_(value)


_written: set[str] = set()
"""Names within their modules of parameters that code has written into."""


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Do as `Unwritten` without a mode, under which compiled code would not run.

    Copies the parameters whose names were written to under `Unwritten` before in this process.
    """
    kept = [
        (one, one.detach().clone())
        for name, one in model.named_parameters()
        if _key(name) in _written and _has_values(one)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory for all its values, unlike a ghost."""
    return not tensor.is_meta and tensor.untyped_storage().nbytes() >= tensor.nbytes


def storage_of(tensor: torch.Tensor) -> int:
    """Return a number that tensors in the same memory share."""
    return int(tensor.untyped_storage()._cdata)


def _random_parts(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (attributes, name) of the dropout rates and noise strengths of a model."""
    for owner, key, value in _held(model):
        # The rate of a dropout module is its ``p``.
        name = type(owner).__name__ if key == "p" and isinstance(owner, nn.Module) else key
        if type(value) is float and _RANDOM.search(name):
            yield vars(owner), key
