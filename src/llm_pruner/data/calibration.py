"""Calibration data: token windows of full length, without padding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, NamedTuple

import torch

from llm_pruner.data.files import BEGINNING
from llm_pruner.data.selfmade import WRITERS, write_text_cached
from llm_pruner.data.sequences import added_tokens, bare_ids, room_for_text
from llm_pruner.data.text import SELF, Documents, load_documents, read_each, running_text, shares_of
from llm_pruner.errors import UserError
from llm_pruner.files.disk import short_digest
from llm_pruner.models.forward import check_length
from llm_pruner.models.load import LoadedModel
from llm_pruner.runtime.progress import Clock
from llm_pruner.settings.common import CalibrationSettings

_LOG = logging.getLogger(__name__)

SHORT_DOCUMENT = 200
"""Documents with fewer characters than this on average are lines of a running text."""
MAX_TEXT_CHARACTERS = 4_000_000
"""Of a longer running text only the beginning is tokenised, unless more is needed."""


@dataclass(frozen=True)
class Calibration:
    """Token windows for calibration.

    Attributes:
        input_ids: shape (samples, seq_len), int64, on the CPU; every position is a real token.
        unseen: other windows of the same sources, shape (windows, seq_len), to measure on; none
            unless they were asked for.
    """

    input_ids: torch.Tensor
    source: str
    settings: dict[str, Any] = field(repr=False)
    unseen: torch.Tensor = field(
        repr=False, default_factory=lambda: torch.empty(0, 0, device="cpu").long()
    )


def build_calibration(
    asked: CalibrationSettings,
    tokenizer: Any,
    model: Any = None,
    *,
    seed: int,
    least: float | None = None,
    unseen: int = 0,
) -> Calibration:
    """Return ``samples`` windows of exactly ``seq_len`` tokens.

    Documents, in an order shuffled by ``seed``, are parted by the special tokens that the tokenizer
    adds (BOS, EOS) or else a blank line, and cut into windows, among which ``seed`` draws. A BOS
    that the tokenizer adds starts every window. A running text (a ``.txt`` file, the rows of
    WikiText or Penn Treebank, documents shorter than ``SHORT_DOCUMENT`` characters on average)
    stays in its order as one document. Several sources give their shares, see ``shares_of``, spread
    evenly over the order.
    """
    check_length(model, asked.seq_len)
    if least is None:
        least = 1 if "samples" in asked.given else 1 / 4
    shares = shares_of(asked.calibration)
    wanted = {
        source: _Wanted(source, count, max(bool(least), int(least * count)), rest)
        for source, count, rest in zip(
            shares, _counts(asked.samples, shares), _counts(unseen, shares), strict=True
        )
    }
    if not all(one.samples for one in wanted.values()):
        raise UserError(
            f"samples={asked.samples} of {len(shares)} sources leave some without any; use more"
        )
    # Enough documents even where each is one short sentence.
    documents = _documents(
        asked,
        {
            source: max(BEGINNING, (one.samples + one.rest) * asked.seq_len // 4)
            for source, one in wanted.items()
        },
    )
    parts = [
        _self_written(one, asked, model, tokenizer, seed)
        if source in WRITERS
        else _read(documents[source], one, asked.seq_len, tokenizer, seed)
        for source, one in wanted.items()
    ]
    input_ids = _spread([one.windows for one in parts])
    settings = {
        "source": asked.calibration,
        "name": ", ".join(one.name for one in parts),
        "split": ",".join(sorted({one.split for one in parts if one.split})) or None,
        "text_field": asked.text_field,
        "text_split": asked.text_split,
        "samples": len(input_ids),
        "seq_len": asked.seq_len,
        "seed": seed,
        "fingerprint": short_digest(input_ids.numpy().tobytes()),
    }
    rest_of_all = _spread([one.unseen for one in parts])
    return Calibration(input_ids, asked.calibration, settings, rest_of_all)


def _spread(parts: list[torch.Tensor]) -> torch.Tensor:
    spread = [((row + 0.5) / len(part), part[row]) for part in parts for row in range(len(part))]
    rows = [row for _, row in sorted(spread, key=lambda placed: placed[0])]
    return torch.stack(rows) if rows else torch.empty(0, 0, device="cpu").long()


def _counts(samples: int, of: Mapping[str, float]) -> list[int]:
    """Return how many of the samples each source gives; the first ones more if that is not even."""
    shares, counts = [*of.values()], list[int]()
    for number, share in enumerate(shares):
        left = samples - sum(counts)
        counts.append(ceil(left * share / sum(shares[number:]) - 1e-9))
    return counts


class _Wanted(NamedTuple):
    """What one source is to give: so many windows, at least ``least``, and ``rest`` others."""

    source: str
    samples: int
    least: int
    rest: int


class _Part(NamedTuple):
    windows: torch.Tensor
    unseen: torch.Tensor
    name: str
    split: str | None = None


def _documents(asked: CalibrationSettings, limits: Mapping[str, int]) -> dict[str, Documents]:
    def read(source: str, text_field: str | None) -> Documents:
        how: Any = {"split": asked.text_split, "limit": limits[source]}
        return load_documents(source, text_field=text_field, **how)

    return read_each(read, [one for one in limits if one not in WRITERS], asked.text_field)


def check_calibration(asked: CalibrationSettings) -> None:
    """Raise UserError if a source of the calibration text cannot be read."""
    _documents(asked, dict.fromkeys(shares_of(asked.calibration), BEGINNING))


def _read(found: Documents, one: _Wanted, seq_len: int, tokenizer: Any, seed: int) -> _Part:
    # The windows are the same whatever ``rest`` is: further documents give the rest alone.
    known = len(found.texts)  # a file is read whole
    if found.split is not None:
        known = max(BEGINNING, one.samples * seq_len // 4)
    documents, further = (
        replace(found, texts=texts) for texts in (found.texts[:known], found.texts[known:])
    )
    windows, unseen = _pack(documents, further, tokenizer, one, seq_len, seed)
    return _Part(windows, unseen, documents.name, documents.split)


def _self_written(
    one: _Wanted, asked: CalibrationSettings, model: Any, tokenizer: Any, seed: int
) -> _Part:
    if model is None:
        raise UserError(f"source {one.source!r} needs the model that writes the text")
    write = WRITERS[one.source]
    size = {"samples": one.samples, "seq_len": asked.seq_len, "seed": seed}
    if asked.kept is None:
        windows = write(model, tokenizer, **size)
    else:
        windows = write_text_cached(model, tokenizer, asked.kept, source=one.source, **size)
    unseen = windows[:0]
    if one.rest:
        other = size | {"samples": one.rest, "seed": (seed + 1) % 2**32}
        unseen = write(model, tokenizer, **other)
    what = "text" if one.source == SELF else "chats"
    return _Part(windows, unseen, f"{what} sampled from the model")


class _Stream:
    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.prefix, self.suffix = added_tokens(tokenizer)
        self.tokens: list[int] = []
        self.read = 0

    def read_on_(self, texts: list[str], documents: int, tokens: int) -> tuple[list[int], int]:
        """Take texts off the end of a list until so many, and so many tokens, are read.

        Returns where windows begin, and where the last ends; reading on adds to them.
        """
        while texts and (self.read < documents or len(self.tokens) < tokens):
            ids = bare_ids(self.tokenizer, texts.pop())
            self.tokens.extend((*self.prefix, *ids, *self.suffix))
            self.read += 1
        starts: list[int] = []
        end = 0
        while True:
            if self.prefix and tuple(self.tokens[end : end + len(self.prefix)]) == self.prefix:
                end += len(self.prefix)  # a window brings its own
            if end + self.size > len(self.tokens):
                return starts, end
            starts.append(end)
            end += self.size


def _texts(documents: Documents, parting: str, needed: int) -> list[str]:
    running = running_text(documents, "standard")
    if running is None and sum(map(len, documents.texts)) < SHORT_DOCUMENT * len(documents.texts):
        running = documents.raw
    texts = documents.texts
    if running is not None:
        texts, parting = (running[: max(MAX_TEXT_CHARACTERS, 16 * needed)],), ""
    return [text + parting for text in texts if text.strip()]


def _pack(
    documents: Documents,
    further: Documents,
    tokenizer: Any,
    wanted: _Wanted,
    seq_len: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut documents into windows; see ``build_calibration``.

    Returns:
        Windows, int64 of shape (samples, seq_len), and at most ``rest`` others, also of
        ``further`` documents: those that stand furthest from a window that was drawn, since
        neighbours may share a document.
    """
    samples, rest = wanted.samples, wanted.rest
    prefix, suffix = added_tokens(tokenizer)
    fresh = room_for_text(seq_len, prefix)
    generator = torch.Generator().manual_seed(seed)
    parting = "" if prefix or suffix else "\n\n"
    texts = _texts(documents, parting, samples * fresh)
    order = torch.randperm(len(texts), generator=generator, device="cpu").tolist()
    unread = [texts[position] for position in reversed(order)]
    stream = _Stream(tokenizer, fresh)
    starts, end = stream.read_on_(unread, 2 * samples, 4 * samples * seq_len)
    if len(starts) < wanted.least:
        tokens = len(starts) * fresh + len(stream.tokens) - end
        raise UserError(
            f"{documents.name} gives {tokens} tokens; {samples} samples of {seq_len} tokens need "
            f"{samples * fresh}; use a longer text, or fewer --samples or a smaller seq_len"
        )
    # A few windows in a row would come from one or two documents.
    drawn = sorted(
        torch.randperm(len(starts), generator=generator, device="cpu")[:samples].tolist()
    )
    if rest:
        unread = [*reversed(_texts(further, parting, rest * fresh)), *unread]
        tokens = (4 * samples + 2 * rest) * seq_len
        starts, _ = stream.read_on_(unread, 2 * (samples + rest), tokens)

    def windows(places: list[int]) -> torch.Tensor:
        rows = [[*prefix, *stream.tokens[starts[i] : starts[i] + fresh]] for i in places]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), seq_len)

    distance = {i: min(abs(i - one) for one in drawn) for i in range(len(starts))} if rest else {}
    others = sorted((i for i in distance if distance[i]), key=lambda i: -distance[i])[:rest]
    return windows(drawn), windows(sorted(others))


SHARED = 32
"""Tokens in a row that two windows do not share by chance."""

FURTHER = 384
"""Windows that a repair may read beyond those that importance is estimated on."""


def further_text(
    loaded: LoadedModel,
    asked: CalibrationSettings,
    known: torch.Tensor,
    apart: torch.Tensor,
    count: int,
    seed: int,
) -> torch.Tensor:
    """Return windows to fit, (windows, seq_len): the known ones, then others of files and datasets.

    What the model would have to write takes longer than fitting what it has written.

    Args:
        known: token ids, shape (samples, seq_len).
    """
    read = {one: share for one, share in shares_of(asked.calibration).items() if one not in WRITERS}
    rows = [*known]
    if read:
        mixture = ",".join(f"{one}:{share}" for one, share in read.items())
        mixture = next(iter(read)) if len(read) == 1 else mixture
        size = max(len(read), count + len(known) + len(apart))  # some of which may be these
        more = asked.but(calibration=mixture, samples=size, score_samples=None, kept=None)
        try:
            text = build_calibration(more, loaded.tokenizer, seed=seed, least=0)
        except UserError as error:  # of a dataset that was read before: the network
            _LOG.warning("no further text could be read, and goes without: %s", error)
            return known
        further = dict.fromkeys(map(tuple, text.input_ids.tolist()))
        seen, held = set(map(tuple, known.tolist())), _runs(apart)
        fresh = [torch.tensor(row, device="cpu") for row in further if row not in seen]
        rows += [row for row in fresh if held.isdisjoint(_runs(row[None]))]
    return torch.stack(rows[: len(known) + count])


def _runs(windows: torch.Tensor) -> set[tuple[int, ...]]:
    """Return all runs of ``SHARED`` tokens, or half a window, in windows of (windows, seq_len)."""
    runs = windows.unfold(1, max(1, min(SHARED, windows.shape[1] // 2)), 1).flatten(0, 1)
    return set(map(tuple, runs.tolist()))


def read_calibration(
    loaded: LoadedModel, asked: CalibrationSettings, seed: int, clock: Clock, unseen: int = 0
) -> Calibration:
    """Return the calibration text of a run; arguments and errors as ``build_calibration``."""
    tokenizer = loaded.require_tokenizer()
    text = build_calibration(asked, tokenizer, loaded.model, seed=seed, unseen=unseen)
    clock.stop("calibration text")
    return text
