"""Write a checkpoint of a real model's shape with random weights, for measures of time and memory.

    python benchmarks/random_checkpoint.py SHAPE --text FILE --out DIR [--holes]

SHAPE is one of those below. Weights are bfloat16, drawn from a normal distribution, layer by layer,
so no more than one layer is in memory; the tokenizer is trained on FILE. The folder is what
``save_pretrained`` writes for such a model: shards, their index, the config, the tokenizer. With
``--holes`` the weights are zeros that take no room on the disk, for what only looks at sizes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

SHAPES = {
    "1B": (2048, 5632, 22, 32, 4),
    "3B": (3200, 8640, 26, 32, 32),
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
    "8x1B": (2048, 5632, 22, 32, 4),
}
"""Hidden size, FFN size, layers, heads and key-value heads of TinyLlama, OpenLLaMA and LLaMA, and
of a Mixtral with eight experts of TinyLlama's size, which are stored one by one."""

DEVIATION = 0.02


def config_of(shape: str) -> LlamaConfig | MixtralConfig:
    """Return the config of a shape."""
    hidden, ffn, layers, heads, kv_heads = SHAPES[shape]
    made = MixtralConfig if shape.startswith("8x") else LlamaConfig
    return made(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )


def write(shape: str, text: Path, out: Path, seed: int = 0, *, holes: bool = False) -> None:
    """Write the folder."""
    out.mkdir(parents=True)
    config = config_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards = defaultdict(list)
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        layer = re.search(r"layers\.(\d+)\.", name)
        shards[int(layer[1]) + 1 if layer else 0].append((name, tensor.shape))
    torch.manual_seed(seed)
    places = {}
    for number, tensors in sorted(shards.items()):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        if holes:
            write_holes(out / file, tensors)
        else:
            values = {
                name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, DEVIATION)
                if len(shape) > 1
                else torch.ones(shape, dtype=torch.bfloat16)
                for name, shape in tensors
            }
            save_file(values, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(dict(tensors), file)
    index = {"metadata": {}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    trained = ByteLevelBPETokenizer()
    trained.train([str(text)], vocab_size=config.vocab_size, special_tokens=["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(out)


def write_holes(file: Path, tensors: Sequence[tuple[str, torch.Size]]) -> None:
    """Write a file of zeros in bfloat16 that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in tensors:
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [begin, end]}
    said = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with file.open("wb") as made:
        made.write(len(said).to_bytes(8, "little") + said)
        made.truncate(8 + len(said) + end)


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--holes", action="store_true")
    options = parser.parse_args()
    write(options.shape, options.text, options.out, holes=options.holes)


if __name__ == "__main__":
    main()
