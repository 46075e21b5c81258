"""Recovery: layout of samples, losses, guard, resume."""

from __future__ import annotations

import gc
import json
import math
import random
import signal
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import architectures

from command import WORDS, done, save_tiny
from helpers import of_tokens_alone, tiny_model
from llm_pruner.data.sequences import TrainingSequence, make_sequence
from llm_pruner.errors import UserError
from llm_pruner.recovery import Teacher, recover_
from llm_pruner.recovery import run as recovering
from llm_pruner.recovery import trainer as training
from llm_pruner.recovery.arguments import training_arguments
from llm_pruner.recovery.methods import lora
from llm_pruner.recovery.packing import StepSamples, can_pack, lay_out, target_logits
from llm_pruner.recovery.run import Outcome
from llm_pruner.recovery.scoring import score
from llm_pruner.recovery.trainer import (
    RecoveryTrainer,
    rate,
)
from llm_pruner.settings.recover import DistillationSettings, TrainingSettings
from losses import distillation_loss, task_loss
from new_processes import start


def sequences(count: int, *, seed: int = 0, longest: int = 24) -> list[TrainingSequence]:
    """Return counting tokens, which can be learned; half of them with a prompt to ignore."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length, first = int(draw.integers(4, longest)), int(draw.integers(3, 200))
        ids = [first + step % 7 for step in range(length)]
        made.append(make_sequence(ids, [number % 2 == 0 or t > 1 for t in range(length)], 0))
    return made


# Layout.


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_that_takes_tokens_alone_is_trained_as_any_other(
    tmp_path: Path, method: str
) -> None:
    settings = TrainingSettings(
        method=method, trainer={"max_steps": 2, "bf16": False}, batch_size=4
    )
    models = of_tokens_alone(tiny_model()), tiny_model()
    own, plain = (
        recover_(one, sequences(12), sequences(4, seed=1), settings, work=tmp_path / str(number))[1]
        for number, one in enumerate(models)
    )
    assert not own.packed
    assert own.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_a_layout_holds_each_sample_once_and_nothing_else(packed: bool) -> None:
    data = sequences(40)
    chosen = list(range(3, 37))
    batches = lay_out(data, chosen, packed=packed, capacity=32, micro_tokens=64)
    found = sorted(sample for batch in batches for sample in batch.samples)
    assert found == chosen
    for batch in batches:
        assert batch.input_ids.shape[1] <= 32
        assert batch.input_ids.numel() <= 64
        learned = torch.zeros_like(batch.learned)
        row, start = 0, 0
        for one in (data[sample] for sample in batch.samples):
            wanted = one.input_ids.tolist()
            if batch.input_ids[row, start : start + len(one)].tolist() != wanted:
                row, start = row + 1, 0  # no token of the data is the 0 of padding
            span = slice(start, start + len(one))
            assert batch.input_ids[row, span].tolist() == wanted
            learned[row, span] = torch.from_numpy(one.learned)
            if batch.position_ids is not None:
                assert batch.position_ids[row, span].tolist() == list(range(len(one)))
            if batch.attention_mask is not None:
                assert int(batch.attention_mask[row].sum()) == len(one)
            start += len(one)
        assert torch.equal(learned, batch.learned)
        assert batch.tokens == sum(len(data[sample]) for sample in batch.samples)
    if packed:
        rows = sum(len(batch.input_ids) for batch in batches)
        tokens = sum(len(data[sample]) for sample in chosen)
        # First fit, longest first, needs at most 11/9 of the fewest rows possible, and one.
        assert rows <= 11 / 9 * math.ceil(tokens / 32) + 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_packed_samples_do_not_see_each_other(family: str) -> None:
    model, data = tiny_model(family), sequences(12)
    assert can_pack(tiny_model(family).bfloat16(), 259)
    assert can_pack(model, 259)
    results = {}
    for packed in (True, False):
        model.zero_grad()
        batches = lay_out(data, range(12), packed=packed, capacity=48, micro_tokens=96)
        loss = sum(task_loss(*target_logits(model, batch)) for batch in batches)
        loss.backward()
        results[packed] = {name: one.grad.clone() for name, one in model.named_parameters()}
        results[packed]["loss"] = loss.detach()
    for name, gradient in results[True].items():
        scale = float(gradient.abs().max())
        assert torch.allclose(gradient, results[False][name], atol=1e-5 * max(scale, 1)), name


def test_a_model_that_mixes_packed_samples_is_found_out() -> None:
    # ALiBi counts distances over the whole row and its mask is built without positions.
    model = tiny_model("bloom")
    assert not can_pack(model, 259)
    assert not can_pack(tiny_model("bloom").bfloat16(), 259)
    rotary = tiny_model("llama")
    inner = rotary.forward

    def deaf(input_ids: torch.Tensor, position_ids: object = None, **keywords: object) -> object:
        return inner(input_ids=input_ids, **keywords)

    rotary.forward = deaf
    assert not can_pack(rotary, 259)


def test_the_order_of_the_data_is_a_function_of_the_seed() -> None:
    def order(steps: int, seed: int) -> list[list[int]]:
        samples = StepSamples(10, 4, steps, seed)
        return [samples[step] for step in range(len(samples))]

    steps = order(7, seed=3)
    assert steps == order(7, seed=3)
    assert steps[:3] == order(3, seed=3)
    assert steps != order(7, seed=4)
    assert sorted(chain.from_iterable(steps[:3])) == list(range(10))
    assert steps[:3] != steps[3:6]
    again = StepSamples(10, 4, 7, seed=3)
    assert [again[step] for step in (5, 1, 6, 0)] == [steps[step] for step in (5, 1, 6, 0)]
    with pytest.raises(IndexError):
        again[7]


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    rates = [rate(step, 100, 10, "linear") for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0
    assert rate(0, 5, 100, "linear") == 1  # a tenth of 5 steps is none
    assert rate(55, 100, 10, "cosine") == pytest.approx(0.5)


# Losses.


def test_the_teacher_runs_once_and_says_what_it_would(tmp_path: Path) -> None:
    model, data = tiny_model("llama", seed=5), sequences(10)
    calls = []
    inner = model.forward

    def counted(*args: object, **keywords: object) -> object:
        calls.append(1)
        return inner(*args, **keywords)

    model.forward = counted
    settings = DistillationSettings(temperature=2.0, teacher_top_k=4)

    def open_cache() -> Teacher:
        return Teacher(model, data, settings, tmp_path, identity="dense", seq_len=32)

    (batch,) = lay_out(data, [7, 2, 5], packed=True, capacity=96, micro_tokens=96)
    ids, values = open_cache().says(batch)
    assert calls
    logits, _ = target_logits(model, batch)
    wanted = F.log_softmax(logits / 2.0, -1).topk(4)
    assert torch.equal(ids, wanted.indices)
    assert torch.allclose(values, wanted.values, atol=4e-3)  # kept in half precision
    calls.clear()
    again = open_cache().says(batch)
    assert not calls
    assert torch.equal(again[0], ids)
    assert torch.equal(again[1], values)
    # Half of a pair of files is no cache.
    next(tmp_path.glob("*/ids.bin")).unlink()
    renewed = open_cache().says(batch)
    assert calls
    assert torch.equal(renewed[0], ids)


def test_held_out_samples_are_scored_by_what_is_trained_on(tmp_path: Path) -> None:
    student, dense, held = tiny_model("llama"), tiny_model("llama", seed=5), sequences(7)
    held = [replace(one, source=number % 2) for number, one in enumerate(held)]
    batches = lay_out(held, range(len(held)), packed=True, capacity=64, micro_tokens=64)
    assert len(batches) > 1
    settings = DistillationSettings(temperature=2.0, distill_weight=0.7, teacher_top_k=4)
    judge = Teacher(dense, held, settings, tmp_path, identity="dense", seq_len=64)
    found = score(student, 3, batches, held, 3, judge)
    mixed, said, tokens = 0.0, [0.0, 0.0], [0, 0]
    for number, one in enumerate(held):
        (alone,) = lay_out(held, [number], packed=False, capacity=64, micro_tokens=64)
        with torch.no_grad():
            logits, wanted = target_logits(student, alone)
            taught, _ = target_logits(dense, alone)
        best = F.log_softmax(taught / 2.0, -1).topk(4)
        nll = task_loss(logits, wanted)
        kl = distillation_loss(logits, best.indices, best.values, 2.0)
        mixed += float(0.7 * kl + 0.3 * nll)
        said[one.source] += float(nll)
        tokens[one.source] += one.targets
    assert found.step == 3
    assert found.loss == pytest.approx(mixed / sum(tokens), rel=1e-3)
    assert found.by_source[:2] == pytest.approx(
        [s / n for s, n in zip(said, tokens, strict=True)], rel=1e-5
    )
    assert found.by_source[2] is None
    alone_again = score(student, 3, batches, held, 3)
    assert alone_again.loss == pytest.approx(sum(said) / sum(tokens), rel=1e-5)
    # What a teacher says of itself is no distance.
    whole = DistillationSettings(distill_weight=1.0, teacher_top_k=4)
    own = Teacher(dense, held, whole, tmp_path, identity="dense", seq_len=64)
    assert abs(score(dense, 0, batches, held, 2, own).loss) < 1e-3


# Runs.


@pytest.mark.slow
def test_all_methods_learn_and_only_what_they_should(tmp_path: Path) -> None:
    train, held = sequences(32), sequences(6, seed=1)
    random.seed(5)
    torch.manual_seed(5)
    drawn = [random.getstate(), torch.random.get_rng_state()]
    for method in ("lora", "full"):
        model = tiny_model("llama")
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        settings = TrainingSettings(method=method, batch_size=8, epochs=2, seq_len=64)
        same, outcome = recover_(model, train, held, settings, work=tmp_path / method)
        assert same is model
        assert outcome.gained
        assert outcome.after.loss < outcome.before.loss
        assert outcome.steps == len(outcome.losses) == 8
        moved = {
            name for name, one in model.named_parameters() if not torch.equal(one, before[name])
        }
        norms = {name for name, one in before.items() if one.ndim == 1}
        head = {"model.embed_tokens.weight", "lm_head.weight"}
        assert moved == {"lora": before.keys() - norms - head, "full": before.keys()}[method]
        assert outcome.run.tokens == 2 * sum(map(len, train))
    assert random.getstate() == drawn[0]
    assert torch.equal(torch.random.get_rng_state(), drawn[1])


def test_adapters_are_on_the_layers_that_are_named() -> None:
    """PEFT has names of its own for the experts of some models."""
    sizes = {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_routed_experts": 4}
    sizes |= {"num_experts_per_tok": 2}
    attention = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    more = {"qk_nope_head_dim": 8, "num_key_value_heads": 6, "moe_intermediate_size": 16}
    model = tiny_model("deepseek_v3", **sizes, **attention, **more, n_group=1, topk_group=1)
    wanted = set(lora.linear_layers(model))
    assert any(name.endswith("mlp.gate_proj") for name in wanted)
    adapted = lora.prepare_(model, TrainingSettings(lora_dropout=0.1))
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert found == wanted


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("deepseek_v4", "o_a_proj"),  # a product in groups
        ("llama4_text", "router"),  # gives more than a product
        ("longcat_flash", "classifier"),  # is read and not called, as the next
        ("mamba", "dt_proj"),
    ],
)
def test_adapters_are_where_a_layer_is_called_and_gives_a_product(
    tmp_path: Path, family: str, without: str
) -> None:
    model = architectures.tiny_model(family)
    drawn = torch.random.get_rng_state()
    names = {name.rpartition(".")[2] for name in lora.linear_layers(model)}
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not model.training
    assert without not in names
    assert {"in_proj", "q_proj", "q_b_proj"} & names
    data = [make_sequence([*range(3, 11)], [True] * 8, 0)] * 2
    settings = TrainingSettings(trainer={"max_steps": 1, "bf16": False}, batch_size=2)
    network, outcome = recover_(model, data, data, settings, work=tmp_path)
    assert network is model
    assert outcome.steps == 1


def test_layers_that_no_token_came_to_are_adapted() -> None:
    model: Any = tiny_model("llama")
    names = lora.linear_layers(model)
    model.model.layers[1].forward = lambda hidden, **_: hidden
    assert lora.linear_layers(model) == names


def test_a_weight_of_several_modules_is_not_adapted() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    names = set(lora.linear_layers(model))
    assert not {f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)} & names
    assert "model.layers.2.mlp.up_proj" in names


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_what_is_learned_beside_quantized_weights_is_merged_into_whole_ones(
    tmp_path: Path, kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    kinds: set[str] = set()
    real = RecoveryTrainer.training_step

    def step(self: Any, model: Any, *args: Any, **keywords: Any) -> Any:
        layer = self.model.base_model.model.model.layers[0].mlp.up_proj.base_layer
        kinds.add(type(layer.weight).__name__)
        return real(self, model, *args, **keywords)

    monkeypatch.setattr(RecoveryTrainer, "training_step", step)
    model = tiny_model("llama")
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    settings = TrainingSettings(
        quantize=kind, batch_size=8, epochs=3, seq_len=64, learning_rate=0.01
    )
    found, outcome = recover_(model, sequences(32), sequences(6, seed=1), settings, work=tmp_path)
    assert kinds == {{"int8": "Int8Tensor", "nf4": "Params4bit"}[kind]}
    assert outcome.gained
    after = dict(found.named_parameters())
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        # What was learned has rank 8; what quantizing loses would have any.
        if not torch.equal(weight, before[name]):
            values = torch.linalg.svdvals(weight.detach() - before[name])
            assert values[8] < 1e-5 * values[0] + 1e-6


def test_a_quantized_model_is_gone_before_the_whole_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingSettings, "check", lambda _: None)  # torchao may be missing
    monkeypatch.setattr(lora, "quantize_", lambda *_: None)
    settings = TrainingSettings(quantize="int8", batch_size=8, trainer={"max_steps": 2}, seq_len=64)
    model, held = tiny_model("llama"), []
    real = RecoveryTrainer.training_step

    def step(self: Any, *args: Any, **keywords: Any) -> Any:
        held.extend(weakref.ref(one) for one in self.model.parameters())
        return real(self, *args, **keywords)

    monkeypatch.setattr(RecoveryTrainer, "training_step", step)

    def again() -> Any:
        gc.collect()
        assert held
        assert not [one for one in held if one() is not None]
        return tiny_model("llama")

    texts = sequences(16), sequences(4, seed=1)
    _, outcome = recover_(model, *texts, settings, work=tmp_path, again=again)
    assert outcome.gained


def test_what_the_trainer_takes_reaches_it(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        seen: ClassVar[list[Any]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            rate = others["lr_scheduler"].get_last_lr()[0]
            self.seen.append((type(others["optimizer"].optimizer).__name__, args.optim, rate))

    given = ("optim=adagrad", "lr_scheduler_type=constant", "warmup_steps=0")
    settings = TrainingSettings(batch_size=8, seq_len=64, learning_rate=0.02, trainer=given)
    recover_(
        tiny_model("llama"),
        sequences(32),
        sequences(6, seed=1),
        settings,
        work=tmp_path / "a",
        callbacks=[Watch()],
    )
    assert Watch.seen == [("Adagrad", "adagrad", 0.02)] * 4
    Watch.seen.clear()
    model = tiny_model("llama")
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    recover_(
        model,
        sequences(32),
        sequences(6, seed=1),
        settings.but(method="full", learning_rate=0.5),
        work=tmp_path / "b",
        callbacks=[Watch()],
        optimizers=(own, None),
    )
    assert [name for name, *_ in Watch.seen] == ["SGD"] * 4
    for said, place in (
        ("lr_scheduler_type=x", "c"),
        ("optim=galore_adamw", "d"),
        ("lr_scheduler_type=cosine_with_min_lr", "e"),
        ("optin=x", "f"),
        ("learning_rate=1", "g"),
    ):
        with pytest.raises(UserError, match=r"^--trainer .*(correct it|mean optim.*|-rate)$"):
            recover_(
                tiny_model("llama"),
                sequences(32),
                sequences(6, seed=1),
                settings.but(trainer=(said,)),
                work=tmp_path / place,
            )


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_a_callback_may_end_a_run(tmp_path: Path, event: str) -> None:
    def end(args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == 3

    stopping = TrainerCallback()
    setattr(stopping, event, end)
    settings = TrainingSettings(batch_size=4, seq_len=64, evaluations=1)
    texts = sequences(32), sequences(6, seed=1)
    how = {"work": tmp_path, "callbacks": [stopping]}
    _, outcome = recover_(tiny_model("llama"), *texts, settings, **how)
    assert (outcome.steps, outcome.run.total) == (3, 8)
    assert [one.step for one in outcome.run.evaluations] == [0, 3]
    assert outcome.gained
    assert outcome.run.stopped == "a callback ended it"
    if event == "on_step_end":  # else it ends behind what is kept of the step
        _, again = recover_(tiny_model("llama"), *texts, settings, **how)
        assert (again.steps, again.after) == (3, outcome.after)


def test_numbers_for_the_trainer() -> None:
    schedule = ("lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 2.0e-5}")
    given = ("adam_epsilon=1e-6", "adam_beta1=0.5", *schedule)
    assert TrainingSettings(trainer=given).trainer == {
        "warmup_steps": 10,
        "adam_epsilon": 1e-6,
        "adam_beta1": 0.5,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 2e-5},
    }


@pytest.mark.parametrize("without", ["attention", "loss"])
def test_each_kernel_can_be_switched_off(tmp_path: Path, without: str) -> None:
    curves = []
    both = ("attention", "loss")
    for kernels in (both, tuple(name for name in both if name != without)):
        settings = TrainingSettings(
            batch_size=8,
            epochs=1,
            seq_len=64,
            kernels=kernels,
            trainer={"bf16": False},
            packing=True,
        )
        work = tmp_path / str(len(kernels))
        _, outcome = recover_(tiny_model("llama"), sequences(32), sequences(4), settings, work=work)
        curves.append(outcome.losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_the_gradient_of_a_step_does_not_depend_on_its_layout(tmp_path: Path) -> None:
    train, held = sequences(16), sequences(4, seed=1)
    curves = []
    for tokens in (32, 4096):
        settings = TrainingSettings(batch_size=8, epochs=2, seq_len=32, micro_tokens=tokens)
        _, outcome = recover_(
            tiny_model("llama"), train, held, settings, work=tmp_path / str(tokens)
        )
        curves.append(outcome.losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_what_makes_it_worse_is_not_kept_and_ends_early(tmp_path: Path) -> None:
    # What is held out are tokens that those to train on never have: they become ever less likely.
    train = sequences(64)
    held = [make_sequence(range(250, 200, -1), [True] * 50, 0)]
    settings = TrainingSettings(
        batch_size=8,
        epochs=4,
        seq_len=64,
        learning_rate=0.02,
        patience=2,
        method="full",
    )
    _, outcome = recover_(tiny_model("llama"), train, held, settings, work=tmp_path)
    assert not outcome.gained
    assert outcome.steps < outcome.run.total == 32
    assert outcome.steps >= 16  # at the full rate a rise says nothing yet
    assert "did not improve for 2 evaluations" in str(outcome.run.stopped)
    assert outcome.after.loss > outcome.before.loss


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    train, held = sequences(24), sequences(6, seed=1)
    settings = TrainingSettings(
        preset="paper",
        method="full",
        learning_rate=0.1,  # good for the first steps, too much for the later ones
        trainer={"warmup_steps": 0},
        batch_size=8,
        epochs=4,
        seq_len=64,
        evaluations=12,
        patience=12,
    )
    _, outcome = recover_(tiny_model("llama"), train, held, settings, work=tmp_path)
    losses = [one.loss for one in outcome.run.evaluations]
    assert outcome.run.best == losses.index(min(losses))
    assert outcome.after.loss == pytest.approx(min(losses), abs=1e-5)


@pytest.mark.slow
def test_a_time_budget_is_planned_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that moves on by 10 milliseconds whenever it is read.
    clock = SimpleNamespace(monotonic=count(step=0.01).__next__)
    for module in ("callbacks", "run"):
        monkeypatch.setattr(f"llm_pruner.recovery.{module}.time", clock)
    train, held = sequences(64), sequences(4, seed=1)
    settings = TrainingSettings(batch_size=4, epochs=1000, seq_len=64, max_minutes=0.03)
    _, outcome = recover_(tiny_model(num_hidden_layers=1), train, held, settings, work=tmp_path)
    assert outcome.run.planned
    assert 4 < outcome.steps <= outcome.run.total < 16_000
    assert outcome.run.seconds <= 60 * 0.03
    assert outcome.run.evaluations[-1].step == outcome.steps


def timed_steps(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, float], float]
) -> tuple[list[float], list[float]]:
    """Let step n, begun at a time, take so long; return the clock and the steps' learning rates."""
    now, rates = [0.0], []
    plain = RecoveryTrainer.training_step

    def step(self: Any, *args: Any, **more: Any) -> Any:
        rates.append(self.lr_scheduler.get_last_lr()[0])
        now[0] += seconds(len(rates), now[0])
        return plain(self, *args, **more)

    monkeypatch.setattr(RecoveryTrainer, "training_step", step)
    clock = SimpleNamespace(monotonic=lambda: now[0])
    for module in ("callbacks", "run"):
        monkeypatch.setattr(f"llm_pruner.recovery.{module}.time", clock)
    return now, rates


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_slow_first_steps_do_not_shorten_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    def seconds(step: int, _: float) -> float:
        if killed and step == 6:
            raise KeyboardInterrupt
        return 6 if step <= 4 else 2

    timed_steps(monkeypatch, seconds)
    train, held = sequences(64), sequences(4, seed=1)
    settings = TrainingSettings(
        batch_size=4,
        epochs=1000,
        seq_len=64,
        max_minutes=5,
        evaluations=3,
        patience=9,
    )

    def recovered() -> Outcome:
        model = tiny_model(num_hidden_layers=1)
        return recover_(model, train, held, settings, work=tmp_path)[1]

    if killed:
        with pytest.raises(KeyboardInterrupt):
            recovered()
        assert (tmp_path / "step-000004").is_dir()  # as soon as there was a plan
    outcome = recovered()
    assert outcome.run.stopped is None
    # 6 seconds a step would be 47 steps.
    assert 130 <= outcome.steps == outcome.run.total <= 142
    assert 0.95 * 300 <= outcome.run.seconds <= 300
    assert len(outcome.run.evaluations) == 4
    assert outcome.run.evaluations[-1].step == outcome.steps


@pytest.mark.slow
@pytest.mark.parametrize("later", [1, 4])
def test_a_machine_that_changes_its_speed_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    _, rates = timed_steps(monkeypatch, lambda _, now: 2 if now < 100 else later)
    train, held = sequences(64), sequences(4, seed=1)
    settings = TrainingSettings(
        batch_size=4,
        epochs=1000,
        seq_len=64,
        max_minutes=5,
        evaluations=6,
        patience=9,
    )
    _, outcome = recover_(tiny_model(num_hidden_layers=1), train, held, settings, work=tmp_path)
    # Planned once, the 142 steps would be over after 193 seconds, or not before 460.
    assert outcome.run.stopped is None
    assert outcome.steps == outcome.run.total == len(rates)
    assert 0.93 * 300 <= outcome.run.seconds <= 300
    assert rates[-1] < 0.05 * max(rates)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[5] = math.nan
    held = [make_sequence(range(10, 30), [True] * 20, 0)]
    train = [make_sequence(range(3, 30), [True] * 27, 0)] * 4
    settings = TrainingSettings(batch_size=4, seq_len=64)
    with pytest.raises(UserError, match="the loss of step 1 is nan; look at the data, or use"):
        recover_(model, train, held, settings, work=tmp_path)


@pytest.mark.parametrize("bf16", [False, True])
def test_held_out_text_that_cannot_judge_is_an_error(tmp_path: Path, bf16: bool) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[5] = math.nan
    held = [make_sequence(range(3, 30), [True] * 27, 0)]
    train = [make_sequence(range(10, 30), [True] * 20, 0)] * 4
    settings = TrainingSettings(batch_size=4, seq_len=64, trainer={"bf16": bf16})
    with pytest.raises(UserError, match="the loss of the held-out text is nan before training"):
        recover_(model, train, held, settings, work=tmp_path)


def test_a_full_disk_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train, held = sequences(24), sequences(4, seed=1)
    settings = TrainingSettings(batch_size=4, seq_len=32, trainer={"save_steps": 1})
    calls: list[Path] = []

    def write(weights: Any, file: Path) -> None:
        calls.append(file)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        save_file(weights, file)

    monkeypatch.setattr(training, "save_file", write)
    _, outcome = recover_(tiny_model("llama"), train, held, settings, work=tmp_path / "work")
    assert outcome.gained
    assert outcome.steps == 6
    assert any("No space left on device" in said for said in caplog.messages)
    assert any(path.name.startswith("step-") for path in (tmp_path / "work").iterdir())
    monkeypatch.setattr(recovering, "free_bytes", lambda _: 10**5)
    said = "checkpoints of 17,280 trained parameters need about 0.6 MB, and the disk of .* 0.1 MB"
    with pytest.raises(UserError, match=said):
        recover_(tiny_model("llama"), train, held, settings, work=tmp_path / "b")
    recover_(tiny_model("llama"), train, held, settings, work=tmp_path / "c", keeps=False)


# Resume.


# With dropout random numbers are drawn at each step, and adapters are PEFT's own operations;
# without, they are one operation on a CPU.
@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.2, 0])
def test_a_run_killed_at_any_step_ends_as_if_it_had_not_been(
    tmp_path: Path, dropout: float
) -> None:
    model = save_tiny(tmp_path / "tiny", num_hidden_layers=2)
    rows = [{"text": WORDS[start:] + WORDS[:start]} for start in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", data, "--set", "seq_len=96", "--batch-size", 4, "--epochs", 2]
    # Scores and checkpoints fall on different steps.
    options += [
        "--set",
        f"lora_dropout={dropout}",
        "--set",
        "evaluations=20",
        "--trainer",
        "save_steps=3",
    ]
    done("recover", model, "--out", tmp_path / "whole", *options)
    at = random.SystemRandom().randint(1, 19)
    code = "import runpy; runpy.run_module('llm_pruner', run_name='__main__', alter_sys=True)"
    said = tmp_path / "said.txt"
    process = start(code, "recover", model, "--out", tmp_path / "cut", *options, said=said)
    while process.is_alive() and f"step {at} of 20" not in said.read_text():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, said.read_text()
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / "cut.recovering").is_dir()
    done("recover", model, "--out", tmp_path / "cut", *options, "--resume")
    assert not (tmp_path / "cut.recovering").exists()
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    before = load_file(model / "model.safetensors")
    assert any(not torch.equal(whole[name], before[name]) for name in whole)
    for name, tensor in whole.items():
        assert torch.allclose(cut[name], tensor, rtol=0, atol=1e-6), (at, name)
    records = [json.loads((tmp_path / n / "recovery.json").read_text()) for n in ("whole", "cut")]
    assert records[0]["losses"] == pytest.approx(records[1]["losses"], abs=1e-6), at
    assert len(records[0]["losses"]) == 20
    scores = [[loss for _, loss in record["evaluations"]] for record in records]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6), at


@pytest.mark.parametrize(("asked", "precision"), [(True, "bf16"), (False, "no")])
def test_the_precision_of_a_launcher_s_config_is_not_asked(
    asked: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    settings = TrainingSettings(trainer={"bf16": asked})
    found = training_arguments(settings)
    assert found.mixed_precision == precision
