"""Hidden states that a student learns from its teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command import WORDS, done, run, save_tiny
from helpers import tiny_model
from llm_pruner import discover
from llm_pruner.data.sequences import TrainingSequence, make_sequence
from llm_pruner.errors import UserError
from llm_pruner.recovery import DistillationSettings, Teacher
from llm_pruner.recovery.forward import forward
from llm_pruner.recovery.hidden import Kept, hidden_distance, learned_states, teacher_states
from llm_pruner.recovery.packing import Batch, lay_out
from llm_pruner.surgery.cut import prune_


def data(count: int = 9) -> list[TrainingSequence]:
    """Return random tokens of which some are not learned."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(4, 20, count).tolist()
    return [
        make_sequence(draw.integers(3, 259, n).tolist(), [t % 3 > 0 for t in range(n)], 0)
        for n in lengths
    ]


def entering(model: Any, layers: Sequence[torch.nn.Module], batch: Batch) -> list[torch.Tensor]:
    """Return what enters layers, (learned tokens, hidden size), seen by hooks."""
    seen: list[torch.Tensor] = []
    hooks = [one.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for one in layers]
    with torch.no_grad():
        model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [one[:, :-1][batch.learned[:, 1:]] for one in seen]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_distance_is_that_of_what_enters_the_layers(family: str) -> None:
    student, teacher = tiny_model(family), tiny_model(family, seed=5)
    sequences = data()
    for batch in lay_out(sequences, range(9), packed=True, capacity=40, micro_tokens=80):
        found = forward(student, batch, output_hidden_states=True)
        own, said = learned_states(found.output, batch), teacher_states(teacher, batch)
        assert len(own) == len(said) == 4
        distance = hidden_distance(own, said, Kept())
        lists = [
            m.model.layers if family == "llama" else m.transformer.h for m in (student, teacher)
        ]
        ours, theirs = (
            entering(model, layers, batch)
            for model, layers in zip((student, teacher), lists, strict=True)
        )
        wanted = 0.0
        for h, g in zip(ours[1:], theirs[1:], strict=True):
            wanted += float(((h - g).norm(dim=-1) / g.norm(dim=-1)).square().sum()) / 2
        assert float(distance.detach()) == pytest.approx(wanted, rel=1e-4)
        assert float(hidden_distance(said, said, Kept())) == 0
        distance.backward()
        early = lists[0][0].mlp
        weight = early.down_proj.weight if family == "llama" else early.c_proj.weight
        assert weight.grad is not None
        assert float(weight.grad.norm()) > 0


def test_layers_that_are_left_learn_from_themselves() -> None:
    teacher = tiny_model(num_hidden_layers=5)
    with torch.no_grad():
        for number in (1, 2):  # layers that do nothing
            layer = teacher.model.layers[number]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    student = tiny_model(num_hidden_layers=5)
    student.load_state_dict(teacher.state_dict())
    prune_(student, discover(student), {"layers": np.array([1, 2])})
    (batch,) = lay_out(data(), range(9), packed=True, capacity=200, micro_tokens=200)
    with torch.no_grad():
        found = forward(student, batch, output_hidden_states=True)
    own, said = learned_states(found.output, batch), teacher_states(teacher, batch)
    assert float(hidden_distance(own, said, Kept((0, 3, 4)))) < 1e-8
    assert float(hidden_distance(own, said, Kept((0, 1, 4)))) < 1e-8  # what enters 1 enters 3
    assert float(hidden_distance(own, said, Kept((0, 3, 3)))) > 1e-2
    with pytest.raises(UserError, match="has 3 layers of 48 hidden channels, the teacher 5 of 48"):
        hidden_distance(own, said, Kept())


def test_hidden_channels_that_are_left_are_compared() -> None:
    said = [torch.randn(6, 10) for _ in range(4)]
    kept = (0, 2, 3, 7)
    own = [one[:, list(kept)].clone() for one in said]
    assert float(hidden_distance(own, said, Kept(channels=kept))) == 0
    own[2][1] *= 3  # |3g - g|^2 / |g|^2 = 4, in one of the two layers that count
    assert float(hidden_distance(own, said, Kept(channels=kept))) == pytest.approx(2)
    own[0] += 1
    own[3] += 1
    assert float(hidden_distance(own, said, Kept(channels=kept))) == pytest.approx(2)
    with pytest.raises(UserError, match="leave out --distill-hidden"):
        hidden_distance(own, said, Kept(channels=(0, 1)))
    with pytest.raises(UserError, match="one layer has no hidden states"):
        hidden_distance(own[:2], own[:2], Kept())


def test_the_loss_adds_it_up(tmp_path: Path) -> None:
    student, dense, sequences = tiny_model(), tiny_model(seed=5), data()
    (batch,) = lay_out(sequences, range(9), packed=True, capacity=200, micro_tokens=200)

    def loss(hidden: float) -> float:
        settings = DistillationSettings(top_k=4, hidden=hidden)
        options: dict[str, Any] = {"identity": "dense", "seq_len": 64}
        return float(Teacher(dense, sequences, settings, tmp_path, **options).loss(student, batch))

    with torch.no_grad():
        found = forward(student, batch, output_hidden_states=True)
        states = learned_states(found.output, batch)
        distance = hidden_distance(states, teacher_states(dense, batch), Kept())
        assert loss(2.5) == pytest.approx(loss(0) + 2.5 * float(distance), rel=1e-5)
    # What the teacher said of the logits is the same, and is kept once.
    assert len(list(tmp_path.iterdir())) == 1


def test_the_command_learns_from_the_layers_that_the_plan_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("dense"), num_hidden_layers=4)
    kinds = ("--structures", "layers", "--criterion", "l2", "--no-verify")
    done("prune", "dense", "--out", "small", "--unit-ratio", 0.34, *kinds)
    rows = [{"text": f"{WORDS[n:]} {n}"} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--data", "rows.jsonl", "--seq-len", 64, "--batch-size", 8, "--max-steps", 4)
    taught = ("--teacher", "dense", "--evaluations", 2)
    done("recover", "small", "--out", "plain", *options, *taught)
    deep = done("recover", "small", "--out", "deep", *options, *taught, "--distill-hidden", 3)
    assert deep.code == 0
    weights = [load_file(f"{name}/model.safetensors") for name in ("plain", "deep")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    record = json.loads(Path("deep/recovery.json").read_text())
    assert record["settings"]["distillation"]["hidden"] == 3
    assert record["gained"]

    Path("small/plan.json").unlink()
    begin = ("recover", "small", "--out", "none", *options)
    for given, said in (
        ((*taught, "--distill-hidden", 1), "has 3 layers of 48 hidden channels, the teacher 4 of"),
        (("--distill-hidden", 1), "--distill-hidden 1 goes with a teacher that is learned from"),
        ((*taught, "--distill-hidden", -1), "--distill-hidden -1.0 is no weight; use such as 1"),
    ):
        refused = run(*begin, *given)
        assert refused.code == 2
        assert said in refused.err
        assert not Path("none").exists()
