"""Log-likelihoods of continuations, each position of each text computed once.

The answers to one question share its text. Here the text runs once, every answer continues from the
cache, and logits are formed for answers only.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from llm_pruner.errors import UserError
from llm_pruner.models.forward import cache_argument, caching, embedding_rows, parameters_of
from llm_pruner.runtime.progress import track

T = TypeVar("T")

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of a continuation, neither of them empty."""
Score = tuple[float, bool]
"""log p(continuation | context) in nats, and whether greedy decoding would say it."""

_TOKENS = {"cpu": 1024, "other": 16_384}  # in a batch, padding included
_LOGITS_BYTES = {"cpu": 256 * 2**20, "other": 2 * 2**30}  # float32 logits of a batch
_RUN = 64  # a run of the model costs about what so many tokens in it cost
_CACHED = 2  # in the cache may stand so many times the tokens of a batch
_SLACK, _SHORT_SLACK = 8, 4  # contexts of a batch may differ by 1/8 of their length, or 4 tokens
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOW_PRECISION_TOLERANCE = 5e-2


@dataclass(frozen=True)
class _Request:
    """Score ``targets`` with the logits of positions ``first`` and following of a row."""

    number: int
    first: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """A sequence to run, and what is read off it; ``first`` is the first position needed."""

    tokens: tuple[int, ...]
    requests: tuple[_Request, ...]
    first: int


def log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_size: int | None = None,
    description: str = "Scoring",
) -> list[Score]:
    """Return sum_t log softmax(logits_t)[x_t] over each continuation x, in the order of ``pairs``.

    The softmax is taken in float32 at least. What is longer than ``max_length`` tokens loses its
    start, as in lm-evaluation-harness.
    """
    scorer = _Scorer(model, batch_size)
    by_context: dict[tuple[int, ...], list[_Row]] = defaultdict(list)
    for row in _rows(pairs, max_length):
        by_context[row.tokens[: row.first + 1]].append(row)
    families = sorted(by_context.values(), key=lambda family: (-family[0].first, family[0].tokens))
    shared = [family for family in families if _worth_sharing(family)]
    alone = [family for family in families if not _worth_sharing(family)]
    if shared and not scorer._can_continue(shared[0]):
        shared, alone = [], families

    def run() -> Iterator[tuple[int, Score]]:
        for batch in scorer.similar_contexts(shared):
            yield from _in_halves(scorer._continued, batch, scorer.whole).items()
        for rows in scorer.padded([row for family in alone for row in family]):
            yield from scorer.whole(rows).items()

    scores = dict(track(run(), description, len(pairs)))
    for number, (value, _) in sorted(scores.items()):
        if math.isnan(value):
            raise UserError(
                f"the log-likelihood of text {number} of {len(pairs)} is not a number; the model "
                "is broken or overflows in its type: try --dtype float32 or bfloat16"
            )
    return [scores[number] for number in range(len(pairs))]


def truncated(pairs: Sequence[Pair], max_length: int) -> int:
    """Return how many pairs are too long to be read whole."""
    return sum(len(context) + len(rest) > max_length + 1 for context, rest in pairs)


def _worth_sharing(family: list[_Row]) -> bool:
    """Whether running the context once saves a third of the tokens, which two steps must."""
    saved = (len(family) - 1) * (family[0].first + 1)
    return 3 * saved >= sum(len(row.tokens) for row in family)


def _rows(pairs: Sequence[Pair], max_length: int) -> list[_Row]:
    """Return the sequences to run; one that is the start of another is read off the longer one."""
    requests: dict[tuple[int, ...], list[_Request]] = defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        if len(continuation) > max_length:
            raise UserError(
                f"an answer of {len(continuation)} tokens does not fit into the model, which reads "
                f"{max_length} at once; leave this task out"
            )
        # The last token is predicted, never read.
        tokens = tuple([*context, *continuation][-(max_length + 1) : -1])
        first = len(tokens) - len(continuation)
        requests[tokens].append(_Request(number, first, tuple(continuation)))
    rows: list[_Row] = []
    waiting: list[_Request] = []
    # In lexical order a sequence stands right before those that it starts.
    ordered = sorted(requests)
    for tokens, following in zip(ordered, [*ordered[1:], ()], strict=True):
        waiting += requests[tokens]
        if following[: len(tokens)] != tokens:
            first = min(request.first for request in waiting)
            rows.append(_Row(tokens, tuple(waiting), first))
            waiting = []
    return rows


def _in_halves(
    run: Callable[[list[T]], dict[int, Score]],
    items: list[T],
    alone: Callable[[T], dict[int, Score]] | None = None,
) -> dict[int, Score]:
    try:
        return run(items)
    except torch.OutOfMemoryError:
        if len(items) == 1 and alone is None:
            raise
    if len(items) == 1 and alone is not None:
        return alone(items[0])
    half = len(items) // 2
    return _in_halves(run, items[:half], alone) | _in_halves(run, items[half:], alone)


class _Scorer:
    def __init__(self, model: Any, batch_size: int | None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.batch_size = batch_size
        kind = "cpu" if self.device.type == "cpu" else "other"
        self.tokens = _TOKENS[kind]
        vocabulary = embedding_rows(model)
        self.positions = max(1, _LOGITS_BYTES[kind] // (4 * vocabulary))
        self.keeps_logits = "logits_to_keep" in parameters_of(model)
        self.cache = cache_argument(model)

    def padded(self, rows: list[_Row]) -> list[list[_Row]]:
        """Return batches of rows of similar length, the longest first."""
        ordered = sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))
        lengths = [len(row.tokens) for row in ordered]
        kept = [len(row.tokens) - row.first for row in ordered]
        return [ordered[part] for part in self._parts(lengths, kept)]

    def similar_contexts(self, families: list[list[_Row]]) -> list[list[list[_Row]]]:
        """Return batches of families, the longest contexts first, that are about equally long."""
        batches: list[list[list[_Row]]] = []
        for family in families:
            length = family[0].first + 1
            longest = batches[-1][0][0].first + 1 if batches else 0
            # What a longer context has beyond the shortest is run once per answer.
            uneven = longest - length > max(length // _SLACK, _SHORT_SLACK)
            if not batches or uneven or self._full(len(batches[-1]), longest, 1):
                batches.append([])
            batches[-1].append(family)
        return batches

    def _parts(self, lengths: list[int], kept: list[int], before: int = 0) -> Iterator[slice]:
        """Yield consecutive parts of sequences, the longest first, that run at once.

        A part ends where it is full, or where its padding would cost more than another run.
        """
        start = padding = most = 0
        for index, length in enumerate(lengths):
            count, longest = index - start, lengths[start]
            most, padding = max(most, kept[index]), padding + longest - length
            full = self._full(count, longest, most)
            if self.batch_size is None:
                full = full or padding > _RUN or (count + 1) * before > _CACHED * self.tokens
            if count and full:
                yield slice(start, index)
                start, padding, most = index, 0, kept[index]
        if lengths:
            yield slice(start, len(lengths))

    def _full(self, count: int, length: int, kept: int) -> bool:
        if self.batch_size is not None:
            return count >= self.batch_size
        count += 1
        kept = kept if self.keeps_logits else length
        return count * length > self.tokens or count * kept > self.positions

    def whole(self, rows: list[_Row]) -> dict[int, Score]:
        """Score rows by running all of them from their first token."""
        return _in_halves(self._whole, rows)

    def _can_continue(self, family: list[_Row]) -> bool:
        """Whether the model gives the same from a cache, which some read a token at a time only."""
        if self.cache is None:
            return False
        wanted = self.whole(family)
        try:
            found = _in_halves(self._continued, [family], self.whole)
        except Exception:  # whatever a model raises that cannot do it
            return False
        tolerance = _TOLERANCE.get(self.model.dtype, _LOW_PRECISION_TOLERANCE)
        return all(
            abs(found[number][0] - value) <= tolerance * (1 + abs(value))
            for number, (value, _) in wanted.items()
        )

    @torch.no_grad()
    def _whole(self, rows: list[_Row]) -> dict[int, Score]:
        longest = max(len(row.tokens) for row in rows)
        keep = longest - min(row.first for row in rows)
        logits = self._run([row.tokens for row in rows], keep, use_cache=False).logits
        start = longest - logits.shape[1]
        return {
            request.number: _score(each[request.first - start :], request.targets)
            for row, each in zip(rows, logits, strict=True)
            for request in row.requests
        }

    @torch.no_grad()
    def _continued(self, families: list[list[_Row]]) -> dict[int, Score]:
        # The start that all contexts have is as long as the shortest, so nothing needs padding
        # before it goes on, which not every model could skip.
        length = min(row.first for family in families for row in family) + 1
        output = self._run([family[0].tokens[:length] for family in families], 1, use_cache=True)
        last = output.logits[:, -1:]
        kept = getattr(output, str(self.cache))
        # Every row goes on: one that ended here would be the start of its siblings.
        owners = sorted(
            ((index, row) for index, family in enumerate(families) for row in family),
            key=lambda owner: -len(owner[1].tokens),
        )
        rests = [row.tokens[length:] for _, row in owners]
        lengths = [len(rest) for rest in rests]
        scores: dict[int, Score] = {}
        for part in self._parts(lengths, lengths, before=length):
            cache = copy.deepcopy(kept)
            index = torch.tensor([index for index, _ in owners[part]], device=self.device)
            cache.reorder_cache(index)
            before = {str(self.cache): cache}
            rest = self._tensor(rests[part])
            logits = self.model(input_ids=rest, use_cache=True, **before).logits
            for (owner, row), each in zip(owners[part], logits, strict=True):
                for request in row.requests:
                    skipped = request.first - length
                    own = torch.cat([last[owner], each]) if skipped < 0 else each[skipped:]
                    scores[request.number] = _score(own, request.targets)
        return scores

    def _run(self, rows: list[tuple[int, ...]], keep: int, *, use_cache: bool) -> Any:
        """Run the model; logits of at least the last ``keep`` positions of the longest row."""
        extra: dict[str, Any] = caching(self.model, use_cache)
        extra |= {"logits_to_keep": keep} if self.keeps_logits else {}
        return self.model(input_ids=self._tensor(rows), **extra)

    def _tensor(self, rows: list[tuple[int, ...]]) -> torch.Tensor:
        """Return int64 (rows, longest); what is shorter ends in zeros, which nothing looks at."""
        tensors = [torch.tensor(row, dtype=torch.int64, device="cpu") for row in rows]
        return pad_sequence(tensors, batch_first=True).to(self.device)


def _score(logits: torch.Tensor, targets: tuple[int, ...]) -> Score:
    """Score targets (T,) with the first T rows of logits (at least T, V)."""
    logits = logits[: len(targets)]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = torch.tensor(targets, device=logits.device)
    each = logits.log_softmax(-1).gather(-1, wanted[:, None])
    return float(each.sum()), bool((logits.argmax(-1) == wanted).all())
