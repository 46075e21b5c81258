"""Train a pruned model on some text, and keep the result only if held-out text says so."""

from __future__ import annotations

import copy
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.errors import UserError
from llm_pruner.files.outputs import free_bytes
from llm_pruner.models.forward import embedding_rows, own_forward
from llm_pruner.models.layers import own_copy
from llm_pruner.recovery import checkpoint as state
from llm_pruner.recovery.arguments import training_arguments
from llm_pruner.recovery.callbacks import Guard, Progress, evaluation_interval
from llm_pruner.recovery.chunked_loss import logits_at_once
from llm_pruner.recovery.objective import Guide
from llm_pruner.recovery.packing import StepSamples, can_pack, lay_out, micro_tokens
from llm_pruner.recovery.scoring import Evaluation, score
from llm_pruner.recovery.trainer import RecoveryTrainer, RunState, Steps
from llm_pruner.runtime.attention import by_sample
from llm_pruner.runtime.memory import give_back
from llm_pruner.runtime.processes import ALONE, Processes
from llm_pruner.runtime.progress import quiet
from llm_pruner.settings.recover import TrainingSettings
from llm_pruner.settings.registry import entry


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        gained: whether the held-out loss fell; if not, the model that was trained is not to be
            kept.
        before: held-out score of the model that came in.
        after: held-out score of the model that was trained, merged, with its best weights as they
            will be saved; if none was better than what came in, the best score on the way.
        packed: whether samples were packed into rows; else they were padded in buckets.
    """

    gained: bool
    before: Evaluation
    after: Evaluation
    run: RunState
    steps: int
    losses: list[float]
    trained: int
    packed: bool


def recover_(
    model: Any,
    train: Sequence[TrainingSequence],
    held_out: Sequence[TrainingSequence],
    settings: TrainingSettings,
    *,
    work: Path,
    keeps: bool = True,
    teacher: Guide | None = None,
    judge: Guide | None = None,
    say: Callable[[Progress], None] = lambda _: None,
    keep_adapter: Path | None = None,
    processes: Processes = ALONE,
    again: Callable[[], Any] | None = None,
    as_saved_: Callable[[Any], None] = lambda _: None,
    **own: Any,
) -> tuple[Any, Outcome]:
    """Train ``model`` in place; return it with its best weights, merged, in eval mode.

    A run that left a checkpoint in ``work`` is continued, and ends with the weights of a run that
    was not interrupted.

    Args:
        model: a causal language model of transformers.
        held_out: samples that decide which weights are kept; none of them is trained on.
        work: folder for checkpoints.
        keeps: write checkpoints.
        teacher: mixes in what a dense model would say of ``train``.
        judge: the same of ``held_out``; without, its text judges.
        say: called after each step.
        keep_adapter: with ``lora``, write the adapter there, before it is merged.
        processes: those that train together; ``settings.batch_size`` is that of all of them, the
            first one writes, and all return the same.
        again: gives the model as it came, to merge into where the trained one is quantized or held
            in parts; by default a copy.
        as_saved_: gives the merged model the weights that will be saved, such as rounded ones,
            before it is scored for the last time.
        own: ``callbacks``, ``optimizers`` and others that transformers' Trainer takes.

    Raises:
        UserError: nothing to train, a loss is not finite, or a checkpoint does not fit.
    """
    settings.check()
    if not train or not held_out:
        raise UserError("recovery needs samples to train on and samples to hold out")
    work.mkdir(parents=True, exist_ok=True)
    merges = settings.quantize == "none" and not processes.sharded
    if not merges and again is None:
        again = partial(own_copy, own_copy(model))
    total = _total_steps(len(train), settings)
    with processes.first():
        checkpoint = state.last_checkpoint(work)
    run = _run_state(checkpoint, total, settings)
    with _apart(model, settings, processes), tempfile.TemporaryDirectory() as unused:
        layout = _layout(model, settings, processes)
        judging = _Judging(held_out, train, layout, judge, run, processes)
        judging.score_what_came(model, also_as_trained=not settings.bf16 and merges)
        torch.manual_seed(settings.seed)
        trained = prepare_(model, settings)
        count = sum(one.numel() for one in trained.parameters() if one.requires_grad)
        if keeps:
            _check_room(work, count, checkpoint, processes)
        on_cpu = next(model.parameters()).device.type == "cpu" and not processes.sharded
        order = StepSamples(len(train), settings.batch_size, total, settings.seed)
        trainer = RecoveryTrainer(
            trained,
            training_arguments(settings, total=total, unused=unused, work=work, on_cpu=on_cpu),
            settings,
            Steps(train, order, **layout),
            run,
            teacher,
            work if keeps else None,
            processes,
            **own,
        )
        trainer.add_callback(Guard(trainer, partial(judging.score_on_the_way, trainer), say))
        initial = state.trained_weights(trained)
        with own_forward(trained):
            _train(trainer, checkpoint)
        best = initial if trainer.best_weights is None else trainer.best_weights
        if not merges:
            _empty_(trained, trainer.optimizer)
            assert again is not None
            model = again()
            trained = prepare_(model, settings.but(quantize="none"))
        model = _with_weights(trained, best, settings, keep_adapter if processes.is_first else None)
        as_saved_(model)
        _keep_activations(model)
        before = run.evaluations[0] if run.before is None else run.before
        after = judging.score_result(trainer.state.global_step, model, before)
    return model, Outcome(
        gained=run.best > 0 and after.loss < before.loss,
        before=before,
        after=after,
        run=run,
        steps=trainer.state.global_step,
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        trained=count,
        packed=layout["packed"],
    )


def _keep_activations(model: Any) -> None:
    """Turn gradient checkpointing off, which has another name since transformers 5.22."""
    if model.is_gradient_checkpointing:
        off = "activation_checkpointing_disable"
        getattr(model, off, model.gradient_checkpointing_disable)()


class _Judging:
    """Scores of the held-out samples; their time counts as the run's."""

    def __init__(
        self,
        held_out: Sequence[TrainingSequence],
        train: Sequence[TrainingSequence],
        layout: dict[str, Any],
        judge: Guide | None,
        run: RunState,
        processes: Processes,
    ) -> None:
        self._held_out, self._judge, self._run, self._processes = held_out, judge, run, processes
        self._batches = lay_out(held_out, range(len(held_out)), **layout)
        self._sources = 1 + max(one.source for one in (*train, *held_out))

    def _score(self, step: int, model: Any) -> Evaluation:
        about = (self._batches, self._held_out, self._sources, self._judge, self._processes)
        return score(model, step, *about)

    def _timed(self, started: float) -> float:
        return self._processes.from_first(time.monotonic() - started)

    def score_on_the_way(self, trainer: RecoveryTrainer, step: int) -> Evaluation:
        """Return the score of the model while it is trained, in the precision of training."""
        with trainer.accelerator.autocast():
            return self._score(step, trainer.model)

    def score_what_came(self, model: Any, *, also_as_trained: bool) -> None:
        """Score the model as it came, unless an interrupted run did.

        ``also_as_trained``: its training starts from just this score.
        """
        run, started = self._run, time.monotonic()
        if self._judge is not None and not run.evaluations:
            own = self._processes.share(self._batches)
            self._judge.prepare(one for one in own if one is not None)
        if run.before is None and not self._processes.sharded:
            begun = time.monotonic()
            run.before = self._score(0, model)
            run.seconds_to_judge = self._timed(begun)
            run.seconds_to_score = run.seconds_to_judge
            if not math.isfinite(run.before.loss):
                raise UserError(
                    f"the loss of the held-out text is {run.before.loss} before training, so "
                    "nothing can be judged; look at the data, or use --dtype float32"
                )
            if also_as_trained:
                run.evaluations.append(run.before)
        run.seconds += self._timed(started)

    def score_result(self, step: int, model: Any, before: Evaluation) -> Evaluation:
        """Return the score of the merged model, or the best on the way if that is no gain."""
        run, started = self._run, time.monotonic()
        if self._processes.sharded:
            return run.evaluations[run.best]
        if not run.best:
            return min(run.evaluations[1:], key=lambda one: one.loss, default=before)
        after = self._score(step, model)
        run.seconds += self._timed(started)
        return after


def _with_weights(
    trained: Any, best: dict[str, torch.Tensor], settings: TrainingSettings, adapter: Path | None
) -> Any:
    """Return the plain model with these weights; save the adapter before, if it has a place."""
    state.set_weights_(trained, best)
    if adapter is not None and settings.method == "lora":
        trained.peft_config["default"].task_type = "CAUSAL_LM"  # by which PEFT finds its model
        trained.save_pretrained(adapter, save_embedding_layers=False)
    return state.merge_(trained)


def prepare_(model: Any, settings: TrainingSettings) -> Any:
    """Prepare a model for ``settings.method``; UserError if it has nothing that that trains."""
    return entry("recovery/methods", settings.method).prepare_(model, settings)


def _check_room(work: Path, trained: int, last: Path | None, processes: Processes) -> None:
    """Raise UserError if a disk has no room for checkpoints: weights, the best, two of AdamW."""
    copies = 2 if last is None else 1  # the older goes when the newer is complete
    needed, free = copies * 16 * trained, processes.from_first(free_bytes(work))
    if needed > free:
        raise UserError(
            f"checkpoints of {trained:,} trained parameters need about {needed / 1e6:,.1f} MB, and "
            f"the disk of {work.parent} has {free / 1e6:,.1f} MB free; free some, give another "
            "--out, or train less with --method lora"
        )


def _layout(model: Any, settings: TrainingSettings, processes: Processes) -> dict[str, Any]:
    """Return how samples are laid out, as arguments of ``lay_out``."""
    in_chunks = _in_chunks(settings, processes)
    return {
        "packed": settings.packing and can_pack(model, embedding_rows(model)),
        "capacity": settings.seq_len,
        "micro_tokens": settings.micro_tokens or micro_tokens(model, settings.seq_len, in_chunks),
        "shares": processes.count,
    }


def _total_steps(samples: int, settings: TrainingSettings) -> int:
    steps = -(-samples // settings.batch_size)
    total = max(1, math.ceil(settings.epochs * steps))
    return min(total, settings.max_steps or total)


def _run_state(checkpoint: Path | None, total: int, settings: TrainingSettings) -> RunState:
    if checkpoint is not None:
        return RunState.read(checkpoint)
    every = evaluation_interval(total, settings.evaluations)
    return RunState(total, every, planned=settings.max_minutes is None)


def _train(trainer: RecoveryTrainer, checkpoint: Path | None) -> None:
    """Train to the end, or read what a run that had come to its end has left."""
    run = trainer.run
    if checkpoint is None:
        trainer.train()
    elif run.stopped is None and int(checkpoint.name.rpartition("-")[2]) < run.total:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))


def _empty_(model: Any, optimizer: Any) -> None:
    """Let go of the weights and of what an optimizer keeps of them, whoever else has the model."""
    for module in model.modules():
        module._parameters.clear()
        module._buffers.clear()
    if optimizer is not None:  # None where nothing was left to train
        optimizer.state.clear()
        optimizer.param_groups.clear()
    give_back()


@contextmanager
def _apart(model: Any, settings: TrainingSettings, processes: Processes) -> Iterator[None]:
    """Leave the model's config and all random generators as they were, and use fast arithmetic.

    Of several processes each makes its logits at once, in the forward pass that joins them.
    """
    with (
        # The name that accelerate and the Trainer use still.
        quiet("transformers", "accelerate", "peft", warned=".*broadcast_buffers.*"),
        torch.enable_grad(),
        by_sample() if settings.uses("attention") else nullcontext(),
        nullcontext() if _in_chunks(settings, processes) else logits_at_once(),
        _same_config(model),
        _own_random(None if processes == ALONE else model.device),
        torch.device("cpu"),  # peft and DataLoader take the default one, which may be another
    ):
        yield


def _in_chunks(settings: TrainingSettings, processes: Processes) -> bool:
    return settings.uses("loss") and processes.count == 1


@contextmanager
def _same_config(model: Any) -> Iterator[None]:
    """Undo what the Trainer sets in the model's config for training, such as ``use_cache``."""
    configs = (model.config, getattr(model, "generation_config", None))
    held = [(one, copy.deepcopy(vars(one))) for one in configs if one is not None]
    try:
        yield
    finally:
        for one, old in held:
            vars(one).clear()
            vars(one).update(old)


@contextmanager
def _own_random(device: torch.device | None) -> Iterator[None]:
    """Give random generators back as they were, of ``device`` or, with None, of all."""
    own, legacy = random.getstate(), np.random.get_state()
    if device is None:
        count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
        devices = [torch.device("cuda", number) for number in range(count)]
    else:
        devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(legacy)
