"""How long a step takes, when a recovery is scored, which weights it keeps, and when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from llm_pruner.errors import UserError
from llm_pruner.recovery.checkpoint import trained_weights
from llm_pruner.recovery.scoring import Evaluation
from llm_pruner.recovery.trainer import RecoveryTrainer, RunState

SCORING = 0.1
"""Share of ``max_minutes`` that scores on the way may take, unless two take more."""

SPARE = 0.05
"""Share of the time left that a plan keeps back for steps that are longer than those timed."""

_BY_CALLBACK = "a callback ended it"


@dataclass(frozen=True)
class Progress:
    """A run's steps, state, last loss, if just scored; ``control``: it is the dense model's."""

    step: int
    run: RunState
    loss: float
    evaluated: bool
    control: bool = False


class Guard(TrainerCallback):
    """Scores the held-out samples, keeps the best weights, and ends the run when it should.

    Args:
        trainer: whose run is guarded; all its processes go by the clock of the first.
    """

    def __init__(
        self,
        trainer: RecoveryTrainer,
        score: Callable[[int], Evaluation],
        say: Callable[[Progress], None],
    ) -> None:
        self._trainer, self._score, self._say = trainer, score, say
        self._run, self._settings = trainer.run, trainer.settings
        self._clock = time.monotonic()
        self._steps: list[float] = []  # seconds of each

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Score the model as it came, unless an earlier process did."""
        self._clock = time.monotonic()
        if not self._run.evaluations:
            self._run.evaluations.append(self._evaluate(0))
        state.max_steps = self._run.total
        self._tick()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Plan, evaluate, keep, stop."""
        run, step = self._run, state.global_step
        before = run.seconds
        self._tick()
        self._steps.append(run.seconds - before)
        replanned = not run.planned and len(self._steps) > TIMED_STEPS
        if replanned:
            self._plan_first(step)
        late = self._late()
        # The Trainer's own end is that of the plan before; any other is a callback's.
        ended = control.should_training_stop and step < min(state.max_steps, run.total)
        last = step >= run.total or late or ended
        diverged = run.stopped is not None
        due = run.planned and step - run.evaluations[-1].step >= run.every
        evaluated = (due or last) and not diverged
        if evaluated:
            if not self._improves(step) and self._hopeless(step) and not last:
                run.stopped = (
                    f"the held-out loss did not improve for {self._settings.patience} evaluations"
                )
            if late and step < run.total:
                run.stopped = f"the {self._settings.max_minutes:g} minutes were over"
            elif ended:
                run.stopped = _BY_CALLBACK
            self._tick()
            if not last and run.stopped is None:
                replanned = self._plan_rest(step) or replanned
                last = step >= run.total
        state.max_steps = run.total
        control.should_training_stop = last or run.stopped is not None
        save_steps = self._settings.trainer.get("save_steps")
        save = step % int(save_steps) == 0 if save_steps else evaluated
        # What was chosen by the clock is kept at once: an interrupted run goes on with it.
        control.should_save = save or replanned or control.should_training_stop
        self._say(Progress(step, run, self._trainer.last_loss, evaluated))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Score the weights of a run that a callback of the user has ended."""
        run, step = self._run, state.global_step
        if step < run.total and run.stopped is None:
            if run.evaluations[-1].step < step:
                self._improves(step)
            run.stopped = _BY_CALLBACK
            self._tick()

    def _improves(self, step: int) -> bool:
        """Evaluate, keep the weights if they are the best so far, and return whether they are."""
        run = self._run
        found = self._evaluate(step)
        run.evaluations.append(found)
        if found.loss >= run.evaluations[run.best].loss:
            return False
        run.best = len(run.evaluations) - 1
        self._trainer.best_weights = trained_weights(self._trainer.model)
        return True

    def _hopeless(self, step: int) -> bool:
        """Whether to stop for want of gains; not before half, as the loss often rises first."""
        run = self._run
        without = len(run.evaluations) - 1 - run.best
        return without >= self._settings.patience and (run.best > 0 or 2 * step >= run.total)

    def _evaluate(self, step: int) -> Evaluation:
        started = time.monotonic()
        found = self._score(step)
        if not math.isfinite(found.loss):
            if step == 0:
                raise UserError(
                    "the loss of the held-out samples is not finite before training; look at the "
                    "data, or load the model in float32"
                )
            found.loss = math.inf
        self._run.seconds_to_score = self._trainer.processes.from_first(time.monotonic() - started)
        return found

    def _tick(self) -> None:
        now = time.monotonic()
        self._run.seconds += self._trainer.processes.from_first(now - self._clock)
        self._clock = now

    def _seconds_of_a_step(self) -> float:
        """Return the mean of the newer half; the first step, which warms up, is never in it."""
        newer = self._steps[-max(1, len(self._steps) // 2) :]
        return sum(newer) / len(newer)

    def _left(self) -> float:
        """Return the seconds left for training and the two last scores."""
        assert self._settings.max_minutes is not None
        scores = self._run.seconds_to_score + self._run.seconds_to_judge
        return 60 * self._settings.max_minutes - self._run.seconds - scores

    def _late(self) -> bool:
        """Whether the time left is too short for one more step."""
        return self._settings.max_minutes is not None and self._left() <= 1.1 * self._steps[-1]

    def _plan_first(self, step: int) -> None:
        """Plan a run by the clock after its first steps."""
        affordable = int(SCORING * self._left() / max(self._run.seconds_to_score, 1e-9))
        self._plan(step, min(self._settings.evaluations, max(2, affordable)))
        self._run.planned = True

    def _plan_rest(self, step: int) -> bool:
        """Stretch or shorten the rest of a run after a score; return whether it is by the clock."""
        run = self._run
        if self._settings.max_minutes is None or len(self._steps) <= TIMED_STEPS:
            return False
        self._plan(step, max(1, -(-(run.total - step) // run.every)))
        return True

    def _plan(self, step: int, evaluations: int) -> None:
        """Choose how many steps fit in the time left, with so many scores on the way.

        The learning rate falls to zero over them, from where it is but for a small jump.
        """
        run = self._run
        left = (1 - SPARE) * self._left() - (evaluations - 1) * run.seconds_to_score
        fitting = step + int(left / max(self._seconds_of_a_step(), 1e-9))
        run.total = max(step, min(len(self._trainer.train_dataset), fitting))
        run.every = evaluation_interval(run.total - run.evaluations[-1].step, evaluations)


class EndAt(TrainerCallback):
    """Ends a run after a number of steps, whatever its learning rate falls towards."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Stop there."""
        control.should_training_stop |= state.global_step >= self._step


def evaluation_interval(total: int, evaluations: int) -> int:
    """Return the steps between evaluations; the last step is always evaluated."""
    return max(1, -(-total // evaluations))


TIMED_STEPS = 3
"""Steps that are timed before a run is planned by the clock; one before them warms up."""
