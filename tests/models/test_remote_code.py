"""Checkpoints that bring Python code of their own: refused unless allowed, then pruned."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from command import contents, done, run
from helpers import VOCABULARY, modules_of_checkpoints_in, tiny_tokenizer
from llm_pruner.discovery.groups import discover
from llm_pruner.models.load import load_model
from llm_pruner.planning.plan import read_plan
from llm_pruner.surgery.cut import cut_
from llm_pruner.surgery.twin import pruned_logits
from llm_pruner.surgery.verify import largest_difference

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def homemade(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint with its own modelling files; what transformers copies of them goes as well."""
    folder = tmp_path_factory.mktemp("models") / "homemade"
    folder.mkdir()
    (folder / "configuration_homemade.py").write_text(CONFIGURATION)
    (folder / "modeling_homemade.py").write_text(MODELLING)
    settings = {
        "model_type": "homemade",
        "vocab_size": VOCABULARY,
        "auto_map": {
            "AutoConfig": "configuration_homemade.HomemadeConfig",
            "AutoModelForCausalLM": "modeling_homemade.HomemadeForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tiny_tokenizer().save_pretrained(folder)
    with modules_of_checkpoints_in(tmp_path_factory.mktemp("modules")):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.15 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        yield folder


def test_refused_unless_allowed(
    homemade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("prune", homemade, "--out", "out", "--ratio", 0.2, "--criterion", "l2")
    assert result.code == 2
    assert (result.out, contents(tmp_path)) == ("", {})
    assert result.err == (
        f"llm-pruner: {homemade} brings Python code of its own, which runs only with "
        "--trust-remote-code; read the code before you allow it\n"
    )


WHOLE = ("--protect-first", 0, "--protect-last", 0)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (
            ("--unit-ratio", 0.5, "--structures", "ffn", *WHOLE),
            "stock",
            "loads with from_pretrained and trust_remote_code=True",
        ),
        (
            ("--unit-ratio", 0.4, "--structures", "heads,ffn", "--layers", "heads=1-2,ffn=0-2"),
            "recipe",
            "loads with from_pretrained and trust_remote_code=True after 'import llm_pruner' ("
            "sizes differ from what a plain config can say)",
        ),
        (
            ("--ratio", 0.337, "--structures", "layers", *WHOLE),
            "stock",
            "loads with from_pretrained and trust_remote_code=True",
        ),
    ],
    ids=["equal layers", "layers that differ", "fewer layers"],
)
def test_pruned_saved_and_loaded(
    homemade: Path, tmp_path: Path, options: tuple[object, ...], kind: str, said: str
) -> None:
    out, report = tmp_path / "smaller", tmp_path / "report.json"
    shown = done(
        *("prune", homemade, "--out", out, "--trust-remote-code", "--criterion", "l2"),
        *("--json", report, *options),
    )
    assert said in " ".join(shown.out.split())
    found = json.loads(report.read_text())
    assert found["saved_as"] == kind
    assert "trust_remote_code=True" in found["needs"]
    assert found["twin_difference"] <= 1e-5
    # The code goes along, so that the folder stands alone.
    assert (out / "modeling_homemade.py").read_text() == MODELLING
    assert (out / "configuration_homemade.py").read_text() == CONFIGURATION

    dense = load_model(str(homemade), trust_remote_code=True).model
    discovery = discover(dense)
    expected = copy.deepcopy(dense)
    cut_(expected, discovery, read_plan(out / "plan.json").removal(discovery))
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    sizes = [sum(p.numel() for p in model.parameters()) for model in (expected, loaded)]
    assert sizes[0] == sizes[1] == found["parameters_after"] < found["parameters_before"]
    for ours, theirs in zip(
        pruned_logits(expected, discovery), pruned_logits(loaded, discovery), strict=True
    ):
        # Weights that were read from a file lie elsewhere in memory, which moves the last bit.
        assert largest_difference([ours], [theirs]) <= 1e-5
    prompt = torch.tensor([[5, 9, 77, 120]])
    one, other = (
        model.eval().generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (expected, loaded)
    )
    assert torch.equal(one, other)
