"""A checkpoint that brings Python code of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import VOCABULARY, modules_of_checkpoints_in, tiny_tokenizer

CONFIGURATION = """
from transformers import PreTrainedConfig


class HomemadeConfig(PreTrainedConfig):
    model_type = "homemade"

    def __init__(self, width=48, depth=4, heads=6, shared=3, head_width=8, inner=40, **others):
        self.width, self.depth, self.inner = width, depth, inner
        self.heads, self.shared, self.head_width = heads, shared, head_width
        self.vocab_size = others.pop("vocab_size", 259)
        super().__init__(**others)
        self.num_hidden_layers = depth
"""

MODELLING = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_homemade import HomemadeConfig


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.number, self.size = number, config.head_width
        self.scale = config.head_width**-0.5
        self.groups = config.heads // config.shared
        self.qkv = nn.Linear(
            config.width, (config.heads + 2 * config.shared) * config.head_width, bias=False
        )
        self.queries = config.heads * config.head_width
        self.keys = config.shared * config.head_width
        self.out = nn.Linear(self.queries, config.width, bias=False)

    def forward(self, x, past):
        batch, length, _ = x.shape
        parts = self.qkv(x).split([self.queries, self.keys, self.keys], dim=-1)
        q, k, v = (part.view(batch, length, -1, self.size).transpose(1, 2) for part in parts)
        if past is not None:
            k, v = past.update(k, v, self.number)
        k, v = (part.repeat_interleave(self.groups, dim=1) for part in (k, v))
        scores = self.scale * (q @ k.transpose(-2, -1))
        hidden = torch.ones(length, k.shape[2], dtype=torch.bool).triu(k.shape[2] - length + 1)
        y = scores.masked_fill(hidden, -1e9).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.before, self.after = Scale(config.width), Scale(config.width)
        self.attention = Attention(config, number)
        self.gate = nn.Linear(config.width, config.inner)
        self.up = nn.Linear(config.width, config.inner)
        self.down = nn.Linear(config.inner, config.width)

    def forward(self, x, past):
        x = x + self.attention(self.before(x), past)
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class HomemadeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HomemadeConfig
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm = Scale(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, past_key_values=None, use_cache=False, **_):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, past_key_values)
        return CausalLMOutputWithPast(
            logits=self.head(self.norm(x)), past_key_values=past_key_values
        )
"""


def checkpoint(place: Path, code: str) -> Iterator[Path]:
    """A checkpoint with its own modelling files; what transformers copies of them goes as well."""
    folder = place / "homemade"
    folder.mkdir(parents=True)
    (folder / "configuration_homemade.py").write_text(CONFIGURATION)
    (folder / "modeling_homemade.py").write_text(code)
    settings = {
        "model_type": "homemade",
        "vocab_size": VOCABULARY,
        "older": True,
        "auto_map": {
            "AutoConfig": "configuration_homemade.HomemadeConfig",
            "AutoModelForCausalLM": "modeling_homemade.HomemadeForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tiny_tokenizer().save_pretrained(folder)
    with modules_of_checkpoints_in(place / "modules"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.15 * torch.randn_like(parameter))
        for module in model.modules():
            module._tied_weights_keys = None
        model.save_pretrained(folder)
        settings |= json.loads((folder / "config.json").read_text()) | {"older": True}
        (folder / "config.json").write_text(json.dumps(settings))
        yield folder
