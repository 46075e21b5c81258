"""Decoding with a model that ``torch.compile`` has made into machine code.

Small models spend a part of each step in Python, which no pruning shortens. Compiled, as they are
for deployment, that part is gone, and what is left is the work itself. On a processor the weights
are compiled in as constants ("freezing"), laid out beforehand for its matrix multiplication, where
they would be looked up and checked in each step otherwise. Nor does a step check that no module has
changed since: nothing changes a model that is measured.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StaticCache

from llm_pruner.errors import UserError
from llm_pruner.models.decode import Decoder, cache_argument

_VARIANTS = 64
"""Compiled versions of one forward pass that may exist: one for each input shape."""
_FILTER = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
_UNCHECKED = {"guard_filter_fn": _FILTER} if _FILTER is not None else None
"""Options of ``torch.compile`` for steps that do not check whether a module has changed.

None where PyTorch is too old to leave such checks out; steps are a little slower there.
"""


class CompiledDecoder(Decoder):
    """A `Decoder` whose forward pass is compiled and whose cache has a fixed size."""

    def __init__(self, model: Any, forward: Callable[..., Any], capacity: int) -> None:
        super().__init__(model)
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._forward = forward

    def forward(self, **inputs: Any) -> Any:
        """Run the compiled model."""
        return self._forward(**inputs)


def compiled(capacity: int, backend: str = "inductor") -> Callable[[Any], CompiledDecoder]:
    """Return what starts a text with a model; a model is compiled when it first runs.

    Args:
        capacity: the most tokens of a text.
        backend: of ``torch.compile``.
    """
    forwards: dict[int, Callable[..., Any]] = {}

    def start(model: Any) -> CompiledDecoder:
        if cache_argument(model) is None:
            raise UserError(
                f"{type(model).__name__} has no cache, so it cannot be compiled for decoding; "
                "leave out --compile"
            )
        if id(model) not in forwards:
            forwards[id(model)] = torch.compile(
                _own(model), dynamic=False, backend=backend, options=_UNCHECKED
            )
        return CompiledDecoder(model, forwards[id(model)], capacity)

    return start


def _own(model: Any) -> Callable[..., Any]:
    """Return a forward pass that is compiled for one model alone.

    What is compiled is found by the code that ran, which the models of a class share, and then by
    checks of which model it is; without checks each needs code of its own.
    """

    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    forward.__code__ = forward.__code__.replace()
    return forward


@contextmanager
def compiling(constant_weights: bool = False) -> Iterator[None]:
    """Let many shapes be compiled, and say in one line why a model cannot be.

    Args:
        constant_weights: compile weights in, which must not change then. Each shape keeps a copy of
            them until the end.

    Raises:
        UserError: a model cannot be compiled here.
    """
    import torch._dynamo as dynamo

    dynamo.reset()
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    limits = {"recompile_limit": _VARIANTS, "fail_on_recompile_limit_hit": True}
    try:
        with (
            dynamo.config.patch(limits),
            torch._inductor.config.patch(freezing=constant_weights, cpp_wrapper=constant_weights),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    except (dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the model cannot be compiled here ({type(error).__name__}: {reason}); "
            "leave out --compile"
        ) from error
    finally:
        logger.setLevel(level)
        dynamo.reset()
