"""Refit and repair after a cut: on which text, and kept only if held-out text says it is a gain."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from llm_pruner.checkpoints.save import round_
from llm_pruner.compensation import Refitted, refit_
from llm_pruner.data.calibration import FURTHER, Calibration, further_text
from llm_pruner.errors import UserError
from llm_pruner.models.activation_store import HiddenStates
from llm_pruner.models.blockwise import NotBlockwise, find_chain
from llm_pruner.models.forward import embedding_rows, undisturbed
from llm_pruner.models.layers import sharing_copy
from llm_pruner.models.load import LoadedModel
from llm_pruner.models.streaming import is_model_streamed, new_weights_in
from llm_pruner.report.records import Training
from llm_pruner.runtime.memory import give_back
from llm_pruner.runtime.precision import mixed_precision
from llm_pruner.search.divergence import divergences
from llm_pruner.search.structure_split import hold_out
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.pruner import Surgeon
from llm_pruner.types import Discovery, Removal

_LOG = logging.getLogger(__name__)

JUDGED = 1024
"""Held-out tokens that all refits together are judged on."""


def fitted_and_judged(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of some samples, (samples, seq_len), are refitted on, and which judge that."""
    if len(tokens) <= 2:  # the least that can be fitted; one of them has to judge, too
        return tokens, tokens[-1:]
    judged, fitted = hold_out(tokens)
    return fitted, judged


def text_to_refit(
    loaded: LoadedModel, settings: PruneSettings, text: Calibration
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples to refit on, as many times those of a text as asked, and those that judge it.

    The first ones are of the text; none is among what judges, or what it left to measure on.
    """
    fitted, judged = fitted_and_judged(text.input_ids)
    further = round((settings.refit_text - 1) * len(text.input_ids))
    if further:
        apart = torch.stack([*judged, *text.unseen])
        fitted = further_text(loaded, settings, fitted, apart, further, settings.seed)
    return fitted, judged


def why_no_chain(network: nn.Module) -> str | None:
    """Return why a model is no chain of blocks, which a refit needs; None if it is."""
    some = torch.arange(8, device=next(network.parameters()).device)[None]
    try:
        with undisturbed(network), torch.enable_grad():
            find_chain(network, some % embedding_rows(network), {}, carries=True)
    except NotBlockwise as reason:
        return str(reason)
    return None


def repaired(
    loaded: LoadedModel,
    dense: nn.Module,
    settings: PruneSettings,
    text: Calibration,
    saved: torch.dtype,
) -> Training | None:
    """Train a pruned model on the predictions of the dense one; None if that cannot be.

    Args:
        text: a part of it judges the training, the rest and further text are trained on.
        saved: the type in which the weights will be saved.
    """
    from llm_pruner.recovery import repair_  # takes a second to import

    held_out, fitted = hold_out(text.input_ids)
    apart = torch.stack([*held_out, *text.unseen])
    try:
        done = repair_(
            loaded.model,
            dense,
            further_text(loaded, settings, fitted, apart, FURTHER, settings.seed),
            held_out,
            minutes=settings.repair_minutes,
            seed=settings.seed,
            as_saved_=partial(round_, dtype=saved),
        )
    except (UserError, torch.OutOfMemoryError) as reason:  # the model is as it was before
        full = isinstance(reason, torch.OutOfMemoryError)
        _LOG.warning("no repair: %s", "the GPU has no room" if full else reason)
        return None
    return Training(
        before=done.before.loss,
        after=done.after.loss,
        gained=done.gained,
        steps=done.steps,
        best_step=done.run.evaluations[done.run.best].step,
        stopped=done.run.stopped,
        tokens=done.run.tokens,
        seconds=done.run.seconds,
    )


class Refitter:
    """Brings the pruned model nearer to the dense one after each cut, if that is a gain.

    Each consumer is judged by its own error on held-out tokens, and all of them together by the
    divergence from the dense model on samples that no fit has seen: if the repaired model is
    further from the dense one than it was, it gets its weights back. What is judged, and what the
    next cut begins with, is rounded as it will be saved.
    """

    def __init__(
        self, loaded: LoadedModel, discovery: Discovery, surgeon: Surgeon, saved: torch.dtype
    ) -> None:
        self._model, self._dense = loaded.model, sharing_copy(loaded.model)
        self._discovery, self._surgeon, self._saved = discovery, surgeon, saved
        self.done: list[Refitted] = []

    def refit(
        self,
        removal: Removal,
        fitted: torch.Tensor,
        judged: torch.Tensor,
        known: HiddenStates | None = None,
    ) -> None:
        """Refit after ``removal``, all that was removed so far in dense numbering.

        Args:
            fitted: tokens, (samples, seq_len).
            judged: other tokens, likewise.
            known: hidden states of the dense model, of the first samples that are fitted or all.
        """
        before = sharing_copy(self._model)
        token = new_weights_in.set(self._saved)
        try:
            with mixed_precision(self._model):
                about = (self._model, self._dense, self._discovery, removal, fitted)
                found = refit_(*about, known=known)
            found = self._judged(found, before, judged)
        except BaseException:
            self._take_back(before)
            raise
        finally:
            new_weights_in.reset(token)
        self.done.extend(found)
        self._surgeon.clock.stop("least squares")

    def _judged(
        self, found: list[Refitted], before: nn.Module, judged: torch.Tensor
    ) -> list[Refitted]:
        """Return what became of each consumer once all were judged together."""
        if not is_model_streamed(self._model):  # its new weights lie in that type already
            for one in found:
                weight = self._model.get_submodule(one.module).get_parameter("weight")
                if one.changed:
                    weight.data = weight.data.to(self._saved).to(weight.dtype)
        give_back()
        judging = judged[: max(1, JUDGED // judged.shape[1])]
        after, without = divergences(self._dense, (self._model, before), judging)
        if not after <= without:
            self._take_back(before)
            return [replace(one, ridge=None, after=one.before) for one in found]
        return found

    def _take_back(self, before: nn.Module) -> None:
        """Give the pruned model the weights that it had."""
        for path, module in before.named_modules():
            now = self._model.get_submodule(path)._parameters
            now.update(module._parameters)
