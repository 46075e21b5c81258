"""Calibration data: token windows of full length, without padding."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, NamedTuple

import torch

from llm_pruner.data.files import BEGINNING, NoFieldError
from llm_pruner.data.selfmade import WRITERS, write_text_cached
from llm_pruner.data.sequences import added_tokens, bare_ids, room_for_text
from llm_pruner.data.text import (
    CHAT,
    SELF,
    Documents,
    check_named,
    load_documents,
    running_text,
    shares_of,
)
from llm_pruner.data.turns import Turns
from llm_pruner.errors import UserError
from llm_pruner.files.disk import short_digest
from llm_pruner.models.forward import check_length
from llm_pruner.models.load import LoadedModel, load_tokenizer
from llm_pruner.runtime.progress import Clock
from llm_pruner.settings.common import CalibrationSettings, ModelSettings

_LOG = logging.getLogger(__name__)

SHORT_DOCUMENT = 200
"""Documents with fewer characters than this on average are lines of a running text."""
_WIDEST = 8
"""Characters of a token, at most, in most texts."""
MAX_TEXT_CHARACTERS = 4_000_000
"""Of a longer running text only the beginning is tokenised, unless more is needed."""


@dataclass(frozen=True)
class Calibration:
    """Token windows for calibration.

    Attributes:
        input_ids: shape (samples, seq_len), int64, on the CPU; every position is a real token.
        settings: what a plan records: source, name, split, text_field, text_split (as it was asked
            for), samples, seq_len, seed and the fingerprint of ``input_ids``.
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

    Documents are tokenised in an order shuffled by ``seed``, put one behind the other, and the
    stream is cut into windows; ``seed`` draws among at least four times as many as are needed, from
    at least twice as many documents (as far as there are so many). Documents are parted by the
    special tokens that the tokenizer adds (BOS, EOS); if it adds none, by a blank line.

    A running text (a ``.txt`` file, the rows of WikiText or Penn Treebank, documents shorter than
    ``SHORT_DOCUMENT`` characters on average) stays in its order as one document.

    Where the tokenizer adds BOS, every window starts with it.

    Of several sources each gives its share of the windows, see ``shares_of``, all spread evenly
    over the order. A source that is too short gives what it has, if that is enough.

    Args:
        asked: what is read, and how much; see ``load_documents``, and ``WRITERS`` for what
            the model writes.
        model: that reads it; needed for ``self`` and ``chat`` alone.
        least: share of its windows that a source must have; by default all if the number is the
            user's, and a quarter if it is a preset's.
        unseen: so many more windows at most that are not among them, see ``_pack``; these stay the
            same. The model writes its own apart.

    Raises:
        UserError: the source cannot be read, or holds too few tokens; windows are longer than what
            the model reads.
    """
    check_length(model, asked.seq_len)
    parts: list[_Part] = []
    rests = _counts(unseen, [*shares_of(asked.calibration).values()])
    for one, rest in zip(_wanted(asked, least), rests, strict=True):
        with one.named(asked):
            if one.source in WRITERS:
                parts.append(_self_written(one, asked, model, tokenizer, seed, rest))
            else:
                parts.append(_read(one, asked, tokenizer, seed, rest))
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
    """Return the rows of all parts, those of each spread evenly over the whole."""
    spread = [((row + 0.5) / len(part), part[row]) for part in parts for row in range(len(part))]
    rows = [row for _, row in sorted(spread, key=lambda placed: placed[0])]
    return torch.stack(rows) if rows else torch.empty(0, 0, device="cpu").long()


def _counts(samples: int, shares: list[float]) -> list[int]:
    """Return how many of the samples each source gives; the first ones more if that is not even."""
    counts: list[int] = []
    for number, share in enumerate(shares):
        left = samples - sum(counts)
        counts.append(ceil(left * share / sum(shares[number:]) - 1e-9))
    return counts


class _Wanted(NamedTuple):
    """What one source is to give: so many windows, or fewer down to the least."""

    source: str
    samples: int
    least: int

    @contextmanager
    def named(self, asked: CalibrationSettings) -> Iterator[None]:
        """Have an error name the source, if it is one of several."""
        try:
            yield
        except UserError as error:
            if asked.samples == self.samples:
                raise
            share = f"{asked.samples} samples are {self.samples} of {self.source}"
            raise UserError(f"{share}: {error}") from error


def _wanted(asked: CalibrationSettings, least: float | None = None) -> list[_Wanted]:
    """Return what each source is to give; arguments and errors as ``build_calibration``."""
    samples, shares = asked.samples, shares_of(asked.calibration)
    counts = _counts(samples, [*shares.values()])
    if not all(counts):
        raise UserError(
            f"samples={samples} of {len(shares)} sources leave some without any; use at least "
            f"{ceil(sum(shares.values()) / min(shares.values()))}"
        )
    if least is None:
        least = 1 if "samples" in asked.given else 1 / 4
    return [
        _Wanted(source, count, max(bool(least), int(least * count)))
        for source, count in zip(shares, counts, strict=True)
    ]


def documents_of(
    source: str, others: Collection[str], *, text_field: str | None, **how: Any
) -> Documents:
    """Read one of several sources, of which one at least has ``text_field``, or UserError."""
    try:
        return load_documents(source, text_field=text_field, **how)
    except NoFieldError:
        if not any(_has_field(other, text_field, how) for other in {*others} - {source}):
            raise
        return load_documents(source, **how)


def _has_field(source: str, text_field: str | None, how: dict[str, Any]) -> bool:
    with suppress(UserError):
        return not load_documents(source, text_field=text_field, **how).plain
    return False


def _documents(source: str, asked: CalibrationSettings, limit: int) -> Documents:
    how = {"split": asked.text_split, "limit": limit}
    return documents_of(source, shares_of(asked.calibration), text_field=asked.text_field, **how)


class _Part(NamedTuple):
    """What one source gives: windows to read, others that are not among them, and its name."""

    windows: torch.Tensor
    unseen: torch.Tensor
    name: str
    split: str | None = None


def _read(one: _Wanted, asked: CalibrationSettings, tokenizer: Any, seed: int, rest: int) -> _Part:
    # Enough documents even where each is one short sentence.
    enough, more = (
        max(BEGINNING, count * asked.seq_len // 4) for count in (one.samples, one.samples + rest)
    )
    found = _documents(one.source, asked, more)
    known = len(found.texts) if found.split is None else enough  # a file is read whole
    documents, further = (
        replace(found, texts=texts) for texts in (found.texts[:known], found.texts[known:])
    )
    windows, unseen = _pack(documents, further, tokenizer, one, asked.seq_len, seed, rest)
    return _Part(windows, unseen, documents.name, documents.split)


def _self_written(
    one: _Wanted, asked: CalibrationSettings, model: Any, tokenizer: Any, seed: int, rest: int
) -> _Part:
    if model is None:
        raise UserError(f"source '{one.source}' needs the model that writes the text")
    write = WRITERS[one.source]
    size = {"samples": one.samples, "seq_len": asked.seq_len, "seed": seed}
    if asked.kept is None:
        windows = write(model, tokenizer, **size)
    else:
        windows = write_text_cached(model, tokenizer, asked.kept, source=one.source, **size)
    unseen = windows[:0]
    if rest:
        other = size | {"samples": rest, "seed": (seed + 1) % 2**32}
        unseen = write(model, tokenizer, **other)
    what = "text" if one.source == SELF else "chats"
    return _Part(windows, unseen, f"{what} sampled from the model")


class _Stream:
    """Tokens of documents one behind the other, and where windows of ``size`` begin in them."""

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
    """Return so many tokens of documents, with what parts them, or a running text as one."""
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
    rest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut documents into windows; see ``build_calibration``.

    Args:
        further: what others than the ``samples`` windows may be of as well.

    Returns:
        Windows, int64 of shape (samples, seq_len), the same whatever ``rest`` is, and at most
        ``rest`` others: those that stand furthest from a window that was drawn, since neighbours
        may share a document. Where the documents have fewer than ``samples``, it is these, if they
        are ``least``.
    """
    samples = wanted.samples
    prefix, suffix = added_tokens(tokenizer)
    fresh = room_for_text(seq_len, prefix)
    generator = torch.Generator().manual_seed(seed)
    needed = samples * fresh
    parting = "" if prefix or suffix else "\n\n"
    texts = _texts(documents, parting, needed)
    order = torch.randperm(len(texts), generator=generator, device="cpu").tolist()
    unread = [texts[position] for position in reversed(order)]
    stream = _Stream(tokenizer, fresh)
    starts, end = stream.read_on_(unread, 2 * samples, 4 * samples * seq_len)
    if len(starts) < wanted.least:
        tokens = len(starts) * fresh + len(stream.tokens) - end
        fit = tokens // fresh
        most = tokens + len(prefix)
        shorter = f", or a --seq-len of at most {most}" if most > 1 else ""
        advice = f"use --samples {fit} or a longer text" if fit else f"use a longer text{shorter}"
        raise UserError(
            f"{documents.name} gives {tokens} tokens; {samples} samples of {seq_len} tokens need "
            f"{needed}; {advice}"
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


def check_calibration(
    asked: CalibrationSettings, model: ModelSettings | None = None, others: Iterable[str] = ()
) -> Any:
    """Raise UserError if the calibration text cannot be read; return the tokenizer, if needed.

    Args:
        model: whose tokenizer tells lengths and writes chats; None if that is not to be known yet.
        others: sources that the same split or field may be of.
    """
    samples, scored = asked.samples, asked.score_samples
    if scored is not None and scored > samples:
        raise UserError(
            f"score_samples={scored} of {samples} samples cannot be read; ask for more samples, or "
            "for fewer of them"
        )
    wanted, tokenizer = _wanted(asked), None
    check_named(
        [*(one.source for one in wanted), *others],
        split=asked.text_split,
        text_field=asked.text_field,
        option="--text-split",
    )
    for one in wanted:
        if one.source == SELF:
            continue
        documents = None if one.source == CHAT else _documents(one.source, asked, BEGINNING)
        if model is None:
            continue
        tokenizer = tokenizer or load_tokenizer(model)
        with one.named(asked):
            if documents is None:
                Turns(tokenizer)
            elif not _holds(documents, tokenizer, one.least * asked.seq_len):
                # That may have been its beginning alone; if not, this says how much there is.
                _read(one, asked, tokenizer, seed=0, rest=0)
    return tokenizer


def _holds(documents: Documents, tokenizer: Any, tokens: int) -> bool:
    """Whether documents have so many tokens; no more is tokenised than that takes."""
    count = 0
    for text in documents.texts:
        count += len(bare_ids(tokenizer, text[: _WIDEST * tokens]))
        if count >= tokens:
            return True
    return False


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
        apart: windows that are left out, of the same length, and with them all that has ``SHARED``
            tokens in a row of them: of a dataset other documents are read if there are to be more
            windows, which then begin elsewhere.
        count: of further ones, as far as the sources have them.
    """
    shares = shares_of(asked.calibration)
    read = {one: share for one, share in shares.items() if one not in WRITERS}
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
