"""Perplexity of a causal language model on one text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from llm_pruner.data.sequences import added_tokens
from llm_pruner.data.text import EvaluationText, Protocol
from llm_pruner.errors import UserError
from llm_pruner.evaluation.divergence import Divergence, compare, divergence
from llm_pruner.files.disk import short_digest
from llm_pruner.models.forward import (
    caching,
    dtype_name,
    embedding_rows,
    evaluating,
    first_tensor,
    maximum_length,
)
from llm_pruner.models.load import LoadedModel
from llm_pruner.models.streaming import is_model_streamed
from llm_pruner.models.synchronized_runs import in_step, result_of, runs_in_step
from llm_pruner.runtime.progress import track
from llm_pruner.settings.evaluate import PerplexitySettings

PAPER_WINDOW = 128
STANDARD_WINDOW = 2048
_LOGITS_BYTES = 256 * 2**20  # logits of one batch, in the model's own type
_TOGETHER_BYTES = 2**30  # the dense model's logits of batches in step
_CHUNK_BYTES = 64 * 2**20  # float32 logits in the loss
_NOT_COMPARED = "so they cannot be compared; give --against the model that it was made of"


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and all that a reader needs to compare it.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood in nats over the predicted tokens.
        bits_per_byte: nll / ln 2 * (tokens of the whole text) / (bytes of it in UTF-8), by which
            models of different tokens can be compared; None where there is no whole text.
    """

    perplexity: float
    nll: float
    tokens: int
    corpus: str
    split: str | None
    window: int
    windows: int
    protocol: Protocol
    stderr: float | None
    divergence: Divergence | None = None
    bits_per_byte: float | None = None
    dtype: str | None = None
    max_tokens: int | None = None
    ids_digest: str | None = None
    text_digest: str | None = None

    @property
    def dense(self) -> PerplexityResult | None:
        """The dense model's on the same windows, if one was given."""
        far, bits = self.divergence, self.bits_per_byte
        if far is None:
            return None
        nll = math.log(far.perplexity)
        return replace(
            self,
            perplexity=far.perplexity,
            nll=nll,
            stderr=far.perplexity_stderr,
            divergence=None,
            bits_per_byte=bits * nll / self.nll if bits else None,
            dtype=far.dtype,
        )


def perplexity(
    model: Any,
    tokenizer: Any,
    text: EvaluationText,
    asked: PerplexitySettings,
    dense: LoadedModel | None = None,
) -> PerplexityResult:
    """Return the perplexity over windows that do not overlap; an incomplete last one is dropped.

    - ``paper``, as LLM-Pruner (arXiv 2305.11627): the text is encoded in one piece with the
      tokenizer's special tokens and cut into windows of 128, of which all but the first token is
      predicted. BOS stands in the first window alone.
    - ``standard``: windows of 2048 tokens, or the model's maximum if that is smaller. Where the
      tokenizer adds BOS, each window begins with it and all else is predicted; else all but the
      first token is.

    The loss is computed in float32 and summed in float64.

    Raises:
        UserError: the text is shorter than a window, a window is longer than the model's maximum,
            the tokens are not the model's or ``dense``'s, or a loss is not finite.
    """
    rows, skipped, tokens = _windows(model, tokenizer, text, asked)
    if dense is not None and dense.tokenizer is not None:
        ours, theirs = (one.get_vocab().items() for one in (tokenizer, dense.tokenizer))
        if {index for _, index in ours ^ theirs}.intersection(rows.unique().tolist()):
            raise UserError(f"{dense.name} has other tokens than the model, {_NOT_COMPARED}")
    found = perplexity_of_windows(model, rows, text, asked, dense, skipped=skipped)
    data = text.text.encode()
    bits = found.nll / math.log(2) * tokens / len(data)
    return replace(found, bits_per_byte=bits, text_digest=short_digest(data))


def check_windows(
    model: Any,
    tokenizer: Any,
    text: EvaluationText,
    asked: PerplexitySettings,
    option: str | None = "seq_len",
) -> None:
    """Raise UserError if a text is too short, or a window too long; ``option`` asks for others."""
    _windows(model, tokenizer, text, asked, option)


def check_tokens(model: Any, largest: int) -> None:
    """Raise UserError if the model has no token of this id, the largest that a tokenizer gave."""
    vocabulary = embedding_rows(model)
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {largest} and the model has {vocabulary} tokens; "
            "use the tokenizer that belongs to the model"
        )


def perplexity_of_windows(
    model: Any,
    rows: torch.Tensor,
    text: EvaluationText,
    asked: PerplexitySettings,
    dense: LoadedModel | None = None,
    *,
    skipped: int = 1,
) -> PerplexityResult:
    """Return the perplexity on token windows, int64 of shape (windows, window); see `perplexity`.

    The first ``skipped`` tokens of a window are not predicted.
    """
    window, vocabulary = rows.shape[1], embedding_rows(model)
    check_tokens(model, int(rows.max()))
    size = model.get_input_embeddings().weight.element_size()
    batch_size = asked.sequences or max(1, _LOGITS_BYTES // (window * vocabulary * size))
    predicted = window - skipped
    found = torch.cat(list(_losses(model, dense, rows, text.name, skipped, batch_size)))
    sums, compared = found[:, 0], found[:, 1:]
    nll = float(sums.sum()) / (len(rows) * predicted)
    value = math.exp(nll) if nll < 700 else math.inf
    spread = float((sums / predicted).std()) / math.sqrt(len(rows)) if len(rows) > 1 else None
    return PerplexityResult(
        perplexity=value,
        nll=nll,
        tokens=len(rows) * predicted,
        corpus=text.name,
        split=text.split,
        window=window,
        windows=len(rows),
        protocol=asked.protocol,
        stderr=None if spread is None else value * spread,
        divergence=None
        if dense is None
        else divergence(dense.name, compared, predicted, dtype_name(dense.model)),
        dtype=dtype_name(model),
        max_tokens=asked.max_tokens,
        ids_digest=short_digest(rows.numpy().tobytes()),
    )


class _Shared(dict[bytes, torch.Tensor]):
    def __deepcopy__(self, _: Any) -> _Shared:
        return self


class Remembered(nn.Module):
    """A model that runs once on each batch, to compare several models with it.

    It keeps the hidden states of a batch and computes the logits anew from them: the same to the
    last bit. A model that changes what its output embedding gives, such as to cap it, runs anew.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._hidden = _Shared()

    def forward(self, input_ids: torch.Tensor, **how: Any) -> Any:
        """Return an output with ``logits``, shape (samples, seq_len, vocabulary)."""
        key, head = input_ids.cpu().numpy().tobytes(), self.model.get_output_embeddings()
        if key in self._hidden:
            return SimpleNamespace(logits=head(self._hidden[key]))
        if head is None:
            return self.model(input_ids=input_ids, **how)
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(_: nn.Module, given: Any, named: Any, gave: torch.Tensor) -> None:
            calls.append((first_tensor(given, named), gave))

        hook = head.register_forward_hook(note, with_kwargs=True)
        try:
            found = self.model(input_ids=input_ids, **how)
        finally:
            hook.remove()
        if len(calls) == 1 and calls[0][1] is found.logits:
            hidden = calls[0][0]
            if self._hidden or torch.equal(head(hidden), found.logits):  # else written into since
                self._hidden[key] = hidden
        return found

    def get_input_embeddings(self) -> Any:
        """Return the model's."""
        return self.model.get_input_embeddings()


def _window_length(model: Any, asked: PerplexitySettings, option: str | None) -> int:
    limit, seq_len = maximum_length(model), asked.seq_len
    if seq_len is None:
        if asked.protocol == "standard":
            return STANDARD_WINDOW if limit is None else min(STANDARD_WINDOW, limit)
        seq_len = PAPER_WINDOW
    if limit is not None and seq_len > limit:
        raise UserError(
            f"a window of {seq_len} tokens is longer than the model's maximum; "
            f"use {option} {limit} or less"
        )
    return seq_len


def _windows(
    model: Any,
    tokenizer: Any,
    text: EvaluationText,
    asked: PerplexitySettings,
    option: str | None = "seq_len",
) -> tuple[torch.Tensor, int, int]:
    """Return windows (windows, window), tokens of each not predicted, tokens of the whole text."""
    window, special = _window_length(model, asked, option), asked.protocol == "paper"
    prefix = () if special else added_tokens(tokenizer)[0]
    encoded = tokenizer(text.text, add_special_tokens=special, verbose=False)["input_ids"]
    ids = torch.tensor(encoded[: asked.max_tokens], dtype=torch.int64, device="cpu")
    fresh = window - len(prefix)
    count = len(ids) // fresh if fresh > 0 else 0
    if count == 0:
        why = "max_tokens is too small" if len(encoded) >= fresh else "the text is too short"
        most = len(ids) + len(prefix)
        shorter = f"{option} {most} or less, or " if option and most > 1 else ""
        raise UserError(
            f"{text.name} gives {len(ids)} tokens and one window needs {fresh}: {why}; use "
            f"{shorter}more text"
        )
    head = torch.tensor(prefix, dtype=torch.int64, device="cpu").expand(count, len(prefix))
    added = sum(map(len, added_tokens(tokenizer))) if special else 0
    windows = torch.cat([head, ids[: count * fresh].view(count, fresh)], dim=1)
    # The tokens of a prefix are never predicted, and without one the first token is not.
    return windows, max(len(prefix), 1), len(encoded) - added


def _losses(
    model: Any,
    dense: LoadedModel | None,
    rows: torch.Tensor,
    name: str,
    skipped: int,
    batch_size: int,
) -> Iterator[torch.Tensor]:
    networks = [model] if dense is None else [model, dense.model]
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(evaluating(network))
        batches = list(enumerate(torch.split(rows, batch_size)))
        together = _batches_in_step(networks, batches[0][1])
        label, of = f"Perplexity on {name}", f"{len(rows)} of {name}"
        starts = range(0, len(batches), together)
        for start in starts if together > 1 else track(starts, label):
            some = batches[start : start + together]
            others: Sequence[torch.Tensor | None] = [None] * len(some)
            if dense is not None:
                jobs = [partial(_logits, batch) for _, batch in some]
                others = [*map(result_of, in_step(dense.model, jobs, label))]
            found = [
                partial(_sums, batch, other, number * batch_size, of, skipped, dense)
                for (number, batch), other in zip(some, others, strict=True)
            ]
            yield from map(result_of, in_step(model, found, label))


def _batches_in_step(networks: Sequence[Any], batch: torch.Tensor) -> int:
    """Return on how many batches models run in step: on one, if none is streamed."""
    counts = [runs_in_step(one, batch.numel()) for one in networks if is_model_streamed(one)]
    if len(networks) > 1:  # the logits of all are there at once
        model = networks[0]
        size = model.get_input_embeddings().weight.element_size()
        counts.append(_TOGETHER_BYTES // (batch.numel() * embedding_rows(model) * size))
    return max(1, min(counts)) if any(map(is_model_streamed, networks)) else 1


@torch.no_grad()
def _sums(
    batch: torch.Tensor,
    other: torch.Tensor | None,
    first: int,
    name: str,
    skipped: int,
    dense: LoadedModel | None,
    network: Any,
) -> torch.Tensor:
    """Return the summed loss of each window and what ``compare`` finds beside the dense logits.

    ``first``: number of the first window; ``name`` says of how many and of which text.
    """
    logits = _logits(batch, network)
    if dense is not None and other is not None and logits.shape != other.shape:
        raise UserError(
            f"{dense.name} predicts {other.shape[-1]} tokens and the model {logits.shape[-1]}, "
            f"{_NOT_COMPARED}"
        )
    found = []
    for index, target in enumerate(batch.to(logits.device)):
        sums = _window_loss(logits[index, skipped - 1 : -1], target[skipped:])[None]
        if not bool(sums.isfinite().all()):
            raise UserError(
                f"the loss of window {first + index} of {name} is {float(sums)}; the model is "
                f"broken or overflows in {logits.dtype}: try float32 or bfloat16"
            )
        if other is not None:
            before, after = (
                one[index, skipped - 1 : -1].to(logits.device) for one in (other, logits)
            )
            sums = torch.cat([sums, compare(before, after, target[skipped:])])
        found.append(sums)
    return torch.stack(found)


@torch.no_grad()
def _logits(batch: torch.Tensor, network: Any) -> torch.Tensor:
    device = next(network.parameters()).device
    return network(input_ids=batch.to(device), **caching(network, False)).logits


def _window_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log softmax(logits)[target], float64; logits (T, V), targets (T,)."""
    # float32 copies of the logits exist for a chunk of positions only.
    chunk = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for part, target in zip(torch.split(logits, chunk), torch.split(targets, chunk), strict=True):
        each = torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
        total += each.double().sum().cpu()
    return total
