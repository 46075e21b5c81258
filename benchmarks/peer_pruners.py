"""Prunes a Llama with one package of the field; ``yardstick.py`` starts it in its environment.

    python peer_pruners.py NAME MODEL TEXT OUT PARAMETERS [--source CHECKOUT]

MODEL is a folder, TEXT the calibration text as .jsonl. Each package is used as its own example uses
it, with the ratio whose size is nearest to PARAMETERS. What all layers lose alike is
saved as it is. Where layers differ, which the packages cannot save so that transformers loads it,
the dense shapes are kept and what was removed is zero: the same function. OUT/peer.json says how
many parameters are left, and in how many seconds. Nothing of llm_pruner is imported.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SAMPLES, LENGTH = 94, 512
"""Calibration as the preset `best` has it."""
PAPER_SAMPLES, PAPER_LENGTH = 10, 64
"""And as LLM-Pruner has it."""
FIRST, LAST = 3, 28
"""Layers of 30 that LLM-Pruner prunes: by default it leaves the first three and the last one."""


def read_documents(text: Path) -> list[str]:
    """Return the documents of a file."""
    return [json.loads(line)["text"] for line in text.read_text().splitlines()]


def read_windows(tokenizer: Any, text: Path, samples: int, length: int) -> torch.Tensor:
    """Return the first tokens of the documents, parted by blank lines, (samples, length)."""
    ids = tokenizer("\n\n".join(read_documents(text)), verbose=False)["input_ids"]
    count = min(samples, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def drawn_windows(tokenizer: Any, text: Path, samples: int, length: int) -> torch.Tensor:
    """Return windows drawn as LLM-Pruner does, from a document each, (samples, length)."""
    draw, documents, windows = random.Random(0), read_documents(text), []
    for document in draw.sample(documents, len(documents)):
        ids = tokenizer(document, verbose=False)["input_ids"]
        if len(ids) >= length and len(windows) < samples:
            begin = draw.randint(0, len(ids) - length)
            windows.append(ids[begin : begin + length])
    return torch.tensor(windows)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters; a tied one counts once."""
    return sum(one.numel() for one in model.parameters())


def nearest(size: Callable[[float], int], wanted: int) -> float:
    """Return the ratio, in steps of a thousandth, whose size is nearest."""
    return min((step / 1000 for step in range(900)), key=lambda ratio: abs(size(ratio) - wanted))


def optipfair(model: Any, windows: torch.Tensor | None, wanted: int) -> nn.Module:
    """FFN neurons by the ranges of their weights, times the norm of what they give on text."""
    import optipfair

    channels = model.config.intermediate_size
    of_one = sum(layer.mlp.gate_proj.weight[0].numel() * 3 for layer in model.model.layers)
    removed = round((parameters(model) - wanted) / of_one)
    batches = None if windows is None else [{"input_ids": row[None]} for row in windows]
    pruned: nn.Module = optipfair.prune_model(
        model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * removed / channels,
        dataloader=batches,
        show_progress=False,
    )
    return pruned


def torch_pruning(model: Any, wanted: int) -> nn.Module:
    """Hidden, FFN and heads by group L2 norm, as its example for language models does."""
    import torch_pruning as tp

    config = model.config

    def size(ratio: float) -> int:
        hidden, ffn = (
            4 * -(-int(width * (1 - ratio)) // 4)
            for width in (config.hidden_size, config.intermediate_size)
        )
        heads, groups = (
            round(of * (1 - ratio)) * config.head_dim
            for of in (config.num_attention_heads, config.num_key_value_heads)
        )
        layer = hidden * (3 * ffn + 2 * heads + 2 * groups + 2)
        return hidden * (config.vocab_size + 1) + config.num_hidden_layers * layer

    ratio = nearest(size, wanted)
    heads = {}
    for layer in model.model.layers:
        heads[layer.self_attn.q_proj] = config.num_attention_heads
        heads[layer.self_attn.k_proj] = config.num_key_value_heads
        heads[layer.self_attn.v_proj] = config.num_key_value_heads
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.tensor([[1, 306, 4658, 278]]),
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        output_transform=lambda output: output.logits,
        pruning_ratio=ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    first = model.model.layers[0]
    config.hidden_size = model.lm_head.in_features
    config.intermediate_size = first.mlp.gate_proj.out_features
    config.num_attention_heads = first.self_attn.q_proj.out_features // config.head_dim
    config.num_key_value_heads = first.self_attn.k_proj.out_features // config.head_dim
    model.tie_weights()
    print(f"ratio {ratio}: {size(ratio):,} foreseen, {parameters(model):,} left")
    return model


def llm_pruner(model: Any, windows: torch.Tensor, wanted: int, source: Path) -> nn.Module:
    """FFN channels of the middle layers by first-order Taylor, as its script for Llama 3 does.

    The script also removes heads. Where query heads share key-value heads it takes as many query as
    key-value heads, after which the model does not run.
    """
    sys.path.insert(0, str(source))
    import LLMPruner.torch_pruning as tp
    from LLMPruner.pruner import hf_llama_pruner
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    width, whole = model.config.intermediate_size, parameters(model)
    layers = model.model.layers[FIRST : LAST + 1]

    def size(ratio: float) -> int:
        channels = width - int(width * (1 - ratio))
        return whole - len(layers) * 3 * model.config.hidden_size * channels

    pruner = tp.pruner.MetaPruner(
        model,
        {"input_ids": torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]] * 2)},
        output_transform=lambda output: output.logits,
        importance=hf_llama_pruner.TaylorImportance("sum", taylor="param_first"),
        global_pruning=False,
        iterative_steps=1,
        ch_sparsity=nearest(size, wanted),
        ignored_layers=[],
        channel_groups={},
        customized_pruners={LlamaRMSNorm: hf_llama_pruner.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=[layer.mlp.gate_proj for layer in layers],
    )
    model.zero_grad()
    model(windows, labels=windows).loss.backward()
    pruner.step()
    model.zero_grad()
    return model


def as_dense(dense: Any, pruned: Any) -> nn.Module:
    """Return the dense model with zeros for the channels removed, found by the values of rows."""
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for before, after in zip(masked.model.layers, pruned.model.layers, strict=True):
            rows = enumerate(before.mlp.gate_proj.weight.detach())
            place = {row.numpy().tobytes(): number for number, row in rows}
            gone = torch.ones(before.mlp.gate_proj.out_features, dtype=torch.bool)
            for row in after.mlp.gate_proj.weight.detach():
                gone[place[row.numpy().tobytes()]] = False
            for one in (before.mlp.gate_proj, before.mlp.up_proj):
                one.weight[gone] = 0
            before.mlp.down_proj.weight[:, gone] = 0
        tokens = torch.tensor([[1, 306, 4658, 278]])
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # else shapes decide how it rounds
        torch.testing.assert_close(masked(tokens).logits, pruned(tokens).logits, atol=1e-3, rtol=0)
        torch.set_float32_matmul_precision(precision)
    return masked


def main() -> None:
    """Prune and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("parameters", type=int)
    parser.add_argument("--source", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")  # as llm_pruner computes its estimates
    dense = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.model)  # as tokenizer.json says
    windows = read_windows(tokenizer, given.text, SAMPLES, LENGTH)
    begun = time.perf_counter()
    model = copy.deepcopy(dense) if given.name == "llm-pruner" else dense
    if given.name.startswith("optipfair"):
        package = "optipfair"
        data = windows if given.name.endswith("data") else None
        saved = pruned = optipfair(model, data, given.parameters)
    elif given.name == "torch-pruning":
        package = "torch-pruning"
        saved = pruned = torch_pruning(model, given.parameters)
    elif given.name == "llm-pruner":
        package = None
        few = drawn_windows(tokenizer, given.text, PAPER_SAMPLES, PAPER_LENGTH)
        pruned = llm_pruner(model, few, given.parameters, given.source)
        saved = as_dense(dense, pruned)
    else:
        sys.path.insert(0, str(Path(__file__).parent))
        from reference.flap import flap

        package = None
        saved, left = flap(model, windows, given.parameters)
        pruned = None
    seconds = time.perf_counter() - begun
    saved.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    said = {
        "parameters": left if pruned is None else parameters(pruned),
        "seconds": round(seconds, 1),
        "version": importlib.metadata.version(package) if package else None,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    (given.out / "peer.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
