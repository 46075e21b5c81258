"""Whether llama.cpp computes an exported model as transformers does, and how large its files are.

    pip install 'llm-pruner[gguf]'
    python benchmarks/rounding.py --work FOLDER ...
    python benchmarks/serve_llamacpp.py --work FOLDER --text FILE

Prunes SmolLM2-135M five ways by L2 importance and exports each in f32: 32 greedy tokens after five
prompts, and the log-probabilities of the tokens of the prompts, beside those of transformers;
greedy tokens of the f16 file; and tokens of lines of text beside those of the folder's tokenizer.
Then exports the dense model and those that ``rounding.py`` left in FOLDER as q8_0 and q4_k_m: size,
perplexity, and KL divergence from the dense model and from the same model before it was packed.
Beside the first stands how far transformers in float32 is from itself in float64. llama.cpp runs
with float32 keys and values and without flash attention. What is already in
benchmarks/results/serve_llamacpp.json is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from commands import found_by, keep, llm_pruner, results_in, stamp
from llama_cpp import Llama
from llm_pruner.models.load import LoadedModel, load_model
from machine import here

RESULTS = Path(__file__).parent / "results"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small",
    "def add(a, b):\n    return",
    "Water boils at one hundred degrees because the pressure",
    "In 1969, the first people who walked on the",
)
LINES, GREEDY = 200, 32
SHAPES = {
    "unequal FFN": ("--ratio", 0.15, "--structures", "ffn", "--set", "scope=global"),
    "unequal KV heads": ("--ratio", 0.05, "--structures", "heads", "--set", "scope=global"),
    "all unequal, layers dropped": (
        *("--ratio", 0.16, "--structures", "heads,query_heads,ffn,layers", "--set", "scope=global"),
        # L2 leaves a wreck, whose rounding errors are beyond what the check of the cut takes.
        *("--set", "split=heads=0.1,query_heads=0.1,ffn=0.6,layers=0.2", "--set", "verify=false"),
    ),
    "equal": ("--ratio", 0.2, "--uniform"),
    "26 of 30 layers": ("--ratio", 0.1053, "--structures", "layers"),
}
ROUNDED = {f"20%, round to {multiple}": multiple for multiple in (1, 32, 256)}


def main() -> None:
    """Prune, export, compare and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, for packed files")
    parser.add_argument("--parts", nargs="+", default=["exact", "packed"])
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_llamacpp.json")
    options = parser.parse_args()
    settings = {
        "model": options.model,
        "text": Path(options.text).name,
        "sample": f"{LINES} lines; {options.windows} windows of 512 tokens",
        **here(),
    }
    result = results_in(options.out, settings, parser)
    text = Path(options.text).read_text(encoding="utf-8")
    for part in options.parts:
        there = result.setdefault(part, {})
        for name, make in (exact if part == "exact" else packed)(options, text):
            if name not in there:
                there[name] = make()
                keep(options.out, result)
                print(name, json.dumps(there[name]), flush=True)


def exact(options: argparse.Namespace, text: str) -> Iterator[tuple[str, Any]]:
    """Yield a name and what is found of it, for the dense model and each shape."""
    preset = options.work / "plain.yaml"
    options.work.mkdir(parents=True, exist_ok=True)
    preset.write_text("structures: [heads, ffn]\n")
    for name, how in {"dense": (), **SHAPES}.items():

        def make(name: str = name, how: Sequence[object] = how) -> dict[str, Any]:
            made = stamp(options.model, *how)
            folder = options.work / f"{name.replace(' ', '-').replace(',', '')}-{made}"
            source = str(folder) if how else options.model
            if how and not folder.exists():
                of = ("--preset", preset, "--criterion", "l2")
                llm_pruner("prune", options.model, "--out", folder, *of, *how)
            return compared(source, options.work, text)

        yield name, make


def compared(source: str, work: Path, text: str) -> dict[str, Any]:
    """Return how a model's files differ from what transformers computes."""
    loaded = load_model(source)
    assert loaded.tokenizer is not None
    prompts = [loaded.tokenizer(prompt).input_ids for prompt in PROMPTS]
    references = [reference(loaded, ids) for ids in prompts]
    found: dict[str, Any] = {"transformers_from_float64": own_rounding(loaded, source)}
    for kind in ("f32", "f16"):
        file = work / f"compared-{kind}.gguf"
        done = found_by("export", source, "--type", kind, "--out", file, "--overwrite")
        llama = Llama(file, 512)
        differences, same = [], 0
        for ids, (tokens, wanted) in zip(prompts, references, strict=True):
            same += tokens == llama.greedy(ids, GREEDY)
            got = chosen(torch.from_numpy(llama.logits(ids)), ids)
            differences.extend((got - wanted).abs().tolist())
        found[kind] = {
            "same_greedy": f"{same} of {len(PROMPTS)}",
            "largest_difference": max(differences),
            "mean_difference": float(np.mean(differences)),
        }
        if kind == "f32":
            lines = [line for line in text.splitlines() if line.strip()][:LINES]
            other = [one for one in lines if llama.tokenize(one) != loaded.tokenizer(one).input_ids]
            found |= {"architecture": done["facts"]["architecture"], "bytes": done["bytes"]}
            found["lines_with_other_tokens"] = f"{len(other)} of {len(lines)}"
        llama.close()
        file.unlink()
    return found


def own_rounding(loaded: LoadedModel, source: str) -> float:
    """Return the largest difference of a model in float32 from itself in float64."""
    double, differences = load_model(source, dtype="float64"), [0.0]
    assert loaded.tokenizer is not None
    for prompt in PROMPTS:
        ids = loaded.tokenizer(prompt).input_ids
        with torch.no_grad():
            one, other = (
                chosen(each.model(torch.tensor([ids])).logits[0], ids) for each in (loaded, double)
            )
        differences.extend((one - other).abs().tolist())
    return max(differences)


def reference(loaded: LoadedModel, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return greedy tokens after a prompt, and log-probabilities of the tokens in it."""
    given = torch.tensor([ids])
    with torch.no_grad():
        logits = loaded.model(given).logits[0]
        loaded.model.generation_config.eos_token_id = None
        text = loaded.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=GREEDY, do_sample=False
        )
    return text[0, len(ids) :].tolist(), chosen(logits, ids)


def chosen(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token but the first, shape (tokens - 1,)."""
    after = torch.tensor(ids[1:])[:, None]
    return logits[:-1].double().log_softmax(-1).gather(1, after)[:, 0]


def packed(options: argparse.Namespace, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the same for packed files of the dense model and of those with rounded widths."""
    dense = load_model(options.model)
    assert dense.tokenizer is not None
    tokens = torch.tensor(dense.tokenizer(text[: 16_384 * options.windows]).input_ids)
    windows = tokens[: 512 * options.windows].view(options.windows, 512)
    for name, multiple in {"dense": None, **ROUNDED}.items():

        def make(multiple: int | None = multiple) -> dict[str, Any]:
            source = options.model if multiple is None else rounded(options.work, multiple)
            own = load_model(source)
            found: dict[str, Any] = {"f32": divergences(windows, dense, own, own)}
            for kind in ("q8_0", "q4_k_m"):
                file = options.work / "packed.gguf"
                done = found_by("export", source, "--type", kind, "--out", file, "--overwrite")
                llama = Llama(file, 512)
                found[kind] = {"bytes": done["bytes"], **divergences(windows, dense, own, llama)}
                found[kind]["left_in_f16"] = done["facts"]["left_in_f16"]
                llama.close()
            return found

        yield name, make


def rounded(work: Path, multiple: int) -> str:
    """Return the folder that ``rounding.py`` left for a multiple."""
    found = [str(folder) for folder in work.glob(f"rounded-{multiple}-*")]
    if len(found) != 1:
        said = f"{work} holds {len(found)} folders rounded-{multiple}-*"
        raise SystemExit(f"{said}; leave that of one run of rounding.py --work {work}")
    return found[0]


def divergences(
    windows: torch.Tensor, dense: LoadedModel, own: LoadedModel, packed: LoadedModel | Llama
) -> dict[str, float]:
    """Return perplexity, and mean KL(dense || packed) and KL(own || packed) in nats a token."""
    loss, from_dense, from_own = 0.0, 0.0, 0.0
    for window in windows:
        ids = window.tolist()
        rows = {id(one): log_probabilities(one, ids) for one in (dense, own, packed)}
        other = rows[id(packed)]
        loss -= float(other[:-1].gather(1, window[1:, None]).mean())
        from_dense += float((rows[id(dense)].exp() * (rows[id(dense)] - other)).sum(-1).mean())
        from_own += float((rows[id(own)].exp() * (rows[id(own)] - other)).sum(-1).mean())
    count = len(windows)
    return {
        "perplexity": float(np.exp(loss / count)),
        "kl_from_dense": from_dense / count,
        "kl_from_itself": from_own / count,
    }


def log_probabilities(model: LoadedModel | Llama, ids: list[int]) -> torch.Tensor:
    """Return shape (tokens, vocabulary)."""
    if isinstance(model, Llama):
        return torch.from_numpy(model.logits(ids)).log_softmax(-1)
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0].log_softmax(-1)


if __name__ == "__main__":
    main()
