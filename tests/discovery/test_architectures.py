"""A part of the sweep over every architecture: one type of each kind of mechanism."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import architectures  # noqa: E402
from tiny_configs import NOT_DECODERS, OVERRIDES, TYPES  # noqa: E402

from llm_pruner.discovery.groups import discover  # noqa: E402

pytestmark = pytest.mark.slow

# Type -> kinds of which some group must be prunable, beside the hidden channels.
EXPECTED = {
    "ctrl": {"heads", "head_dim", "ffn"},
    "deepseek_v2": {"heads", "value_dim", "other"},  # rotation of complex numbers
    "deepseek_v32": {"heads", "other", "experts"},  # latent attention with an indexer
    "emu3": {"heads", "ffn"},  # the text part of a larger model, with a config of its own
    "falcon_h1": {"heads", "query_heads"},  # attention beside a state space
    "gemma3n_text": {"heads", "query_heads", "other"},  # inputs per layer
    "gpt_bigcode": {"heads", "ffn"},  # one key-value head, fused
    "gpt_oss": {"heads", "query_heads", "experts"},  # sinks, biases of experts
    "llama4_text": {"heads", "experts"},  # tokens repeated for each expert
    "mamba2": {"heads", "head_dim", "value_dim"},
    "nemotron_h": {"heads", "ffn", "experts"},
    "recurrent_gemma": {"heads", "ffn"},  # states kept on modules
    "rwkv": {"ffn", "layers"},  # a norm in the first layer only
    "xlnet": {"heads", "head_dim", "ffn"},  # einsum
    "xlstm": {"ffn"},
    "zamba": {"heads", "head_dim"},  # state spaces that are filled anew when they are loaded
}

# Type -> what is said of its weights read block by block, where it is not "same".
IN_ONE_PIECE = {
    "emu3": "",  # what is saved is no causal model of its own
    "falcon_h1": r".*mup_vector .* is computed in the type of the weights.*",
}


def test_every_registered_type_is_swept() -> None:
    assert set(TYPES) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(NOT_DECODERS) & set(OVERRIDES)
    # Of newer types than transformers has here, the table was made with a release that has them.
    table = json.loads((TOOLS.parent / "docs/reference/architectures.json").read_text())
    assert set(NOT_DECODERS) | set(OVERRIDES) <= {row["type"] for row in table["rows"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", EXPECTED)
def test_type(model_type: str, record_property: Any) -> None:
    row = architectures.examine(model_type, thorough=False)
    assert row.result in ("passes", "ffn only"), row
    assert {kind for kind, (groups, _, _) in row.kinds.items() if groups} >= EXPECTED[model_type]
    assert row.twin["all"] <= architectures.TOLERANCE
    assert row.reload in ("stock", "remote_code")
    assert re.fullmatch(IN_ONE_PIECE.get(model_type, "same"), row.by_block)
    assert row.unseen == []
    assert row.shifted > 0
    assert [
        name for name in row.missed if architectures.why_unseen(name) == architectures.UNEXPLAINED
    ] == []
    record_property("twin", (model_type, "all", max(row.twin.values())))
    record_property("mutations", (model_type, row.shifted, row.shifted - row.caught))


def test_what_goes_wrong_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(model_type: str) -> architectures.Row:
        if model_type == "hangs":
            architectures.time.sleep(60)
        if model_type == "dies":
            raise SystemExit(3)
        return architectures.Row(model_type, "passes")

    monkeypatch.setattr(architectures, "examine", crash)
    rows = {row.type: row for row in architectures.sweep(["hangs", "dies", "runs"], limit=1.0)}
    assert "more than 1 s" in rows["hangs"].reason
    assert "ended with 3" in rows["dies"].reason
    assert rows["runs"].result == "passes"
    page = architectures.markdown(list(rows.values()))
    assert "| passes | 1 |" in page
    assert "| CRASH | 2 |" in page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_heads_whose_slopes_the_code_computes_are_named_with_the_reason(model_type: str) -> None:
    discovery = discover(architectures.tiny_model(model_type))
    free = {group.kind for group in discovery.groups if group.frozen is None}
    assert "heads" not in free
    assert "head_dim" in free
    why = {axis.reason for axis in discovery.frozen}
    why |= {group.frozen for group in discovery.groups if group.frozen is not None}
    assert any(one.startswith("its heads: ") for one in why), why
