"""How a recovery run trains, and presets for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal, get_args

from llm_pruner.errors import UserError
from llm_pruner.settings.limits import MOST, MOST_MINUTES, check_number, check_seed

Method = Literal["lora", "full", "norms"]
Start = Literal["default", "pissa", "olora"]
Schedule = Literal["linear", "cosine"]

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""What the Trainer reports to -> packages of which it needs one."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on all linear layers but the output embedding; see PEFT's ``LoraConfig``.

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r (alpha / sqrt(r) with ``rslora``).
        dropout: of the adapter's input.
        dora: learn magnitudes and directions apart (arXiv 2402.09353).
        rslora: see alpha (arXiv 2312.03732).
        start: ``default`` starts from no change; ``pissa`` and ``olora`` from the principal parts
            of the weights.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    start: Start = "default"


@dataclass(frozen=True)
class RecoverySettings:
    """How to train.

    Attributes:
        method: ``lora``; ``full`` trains every weight; ``norms`` norm weights and biases alone.
        learning_rate: at its peak.
        warmup_steps: steps to reach it, at most a tenth of the run.
        schedule: how it falls to zero at the end of the run.
        batch_size: samples in a step.
        epochs: passes over the training data.
        seq_len: longest sample, and length of a packed row, in tokens.
        max_steps: stop after this many steps.
        max_minutes: stop, evaluated, within this time. Steps are timed and the run is planned to
            end in it, so that the learning rate reaches zero; anew at each evaluation.
        evaluations: times the held-out samples are scored during the run; with ``max_minutes``
            fewer if they would take more than a tenth of it, but two.
        patience: stop when they did not improve for this many evaluations; before the half of the
            run only if they had improved at all.
        save_every: steps between checkpoints; None for one at each evaluation.
        max_grad_norm: gradients are scaled down to this norm.
        weight_decay: of AdamW.
        bf16: compute in bfloat16 (autocast); weights keep their type. None leaves it to
            ``recover_checkpoint``: where the processor multiplies it faster than float32.
        gradient_checkpointing: compute activations twice instead of keeping them.
        micro_tokens: tokens in one forward pass; None for what the logits' memory allows, and on a
            CPU 2,048.
        seed: of the order of the data, the adapters and dropout.
        report_to: ``none``, ``tensorboard`` or ``wandb``.
    """

    method: Method = "lora"
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: Schedule = "linear"
    batch_size: int = 64
    epochs: float = 2.0
    seq_len: int = 256
    lora: LoraSettings = field(default_factory=LoraSettings)
    max_steps: int | None = None
    max_minutes: float | None = None
    evaluations: int = 10
    patience: int = 3
    save_every: int | None = None
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    micro_tokens: int | None = None
    seed: int = 0
    report_to: str = "none"

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        known: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("method", self.method, get_args(Method)),
            ("schedule", self.schedule, get_args(Schedule)),
            ("lora-start", self.lora.start, get_args(Start)),
            ("report-to", self.report_to, ("none", "tensorboard", "wandb")),
        )
        for name, value, values in known:
            if value not in values:
                raise UserError(f"{name} {value!r} is unknown; use one of {', '.join(values)}")
        whole: tuple[tuple[str, float | None, float, float], ...] = (
            ("batch-size", self.batch_size, 1, 2**20),
            ("seq-len", self.seq_len, 2, 2**24),
            ("lora-r", self.lora.r, 1, 2**16),
            ("max-steps", self.max_steps, 1, MOST),
            ("evaluations", self.evaluations, 1, MOST),
            ("patience", self.patience, 1, MOST),
            ("save-every", self.save_every, 1, MOST),
            ("warmup-steps", self.warmup_steps, 0, MOST),
        )
        for name, number, minimum, maximum in whole:
            if number is not None and number < minimum:
                raise UserError(f"--{name} {number} is too small; use {minimum:g} or more")
            check_number(f"--{name}", number, minimum, maximum)
        positive: tuple[tuple[str, float | None, float], ...] = (
            ("learning-rate", self.learning_rate, 1000),
            ("epochs", self.epochs, MOST),
            ("max-minutes", self.max_minutes, MOST_MINUTES),
            ("lora-alpha", self.lora.alpha, MOST),
        )
        for name, number, maximum in positive:
            if number is not None and not 0 < number < float("inf"):
                raise UserError(f"--{name} {number} trains nothing; use a number above 0")
            check_number(f"--{name}", number, 0, maximum)
        check_number("--weight-decay", self.weight_decay, 0, 10)
        check_seed(self.seed)
        packages = _TRACKERS.get(self.report_to, ())
        if packages and not any(find_spec(package) for package in packages):
            raise UserError(
                f"--report-to {self.report_to} needs the package {packages[0]}, which is not "
                f"installed; run 'pip install {packages[0]}', or leave --report-to out"
            )
        if not 0 <= self.lora.dropout < 1:
            raise UserError(
                f"--lora-dropout {self.lora.dropout} is outside [0, 1); use such as 0.05"
            )


PRESETS: dict[str, RecoverySettings] = {
    "paper": RecoverySettings(lora=LoraSettings(dropout=0.05)),
    "quick": RecoverySettings(
        learning_rate=1e-3, warmup_steps=10, schedule="cosine", batch_size=4, epochs=1, seq_len=512
    ),
}
"""``paper`` is what LLM-Pruner (arXiv 2305.11627) does; ``quick`` is for minutes on a CPU."""

RATES: dict[str, dict[Method, float]] = {
    "paper": {"lora": 1e-4, "full": 2e-5, "norms": 1e-3},
    "quick": {"lora": 1e-3, "full": 1e-4, "norms": 5e-3},
}
"""Learning rate by preset and method."""


def preset(name: str, method: str | None = None, **changes: Any) -> RecoverySettings:
    """Return a preset with values that replace its own; those that are None do not.

    Raises:
        UserError: there is no such preset, or a value cannot be.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    settings = PRESETS[name]
    given = {key: value for key, value in changes.items() if value is not None}
    lora = {key[5:]: given.pop(key) for key in list(given) if key.startswith("lora_")}
    if method is not None:
        given["method"] = method
        rates: dict[Any, float] = RATES[name]
        given.setdefault("learning_rate", rates.get(method, settings.learning_rate))
    settings = replace(settings, **given, lora=replace(settings.lora, **lora))
    settings.check()
    return settings
