"""Calibration data: token windows of full length, without padding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from llm_pruner.data.selfmade import write_text_cached, write_windows
from llm_pruner.data.sequences import added_tokens
from llm_pruner.data.text import (
    SELF,
    Documents,
    join_records,
    load_documents,
    record_format,
    sources_of,
)
from llm_pruner.errors import UserError
from llm_pruner.models.load import LoadedModel
from llm_pruner.runtime.progress import Clock
from llm_pruner.settings.common import CalibrationSettings
from llm_pruner.settings.limits import MOST, check_number

SHORT_DOCUMENT = 200
"""Documents with fewer characters than this on average are lines of a running text."""
MAX_TEXT_CHARACTERS = 4_000_000
"""Of a longer running text only the beginning is tokenised, unless more is needed."""
_SELF_NAME = "text sampled from the model"


@dataclass(frozen=True)
class Calibration:
    """Token windows for calibration.

    Attributes:
        input_ids: shape (samples, seq_len), int64, on the CPU; every position is a real token.
        source: what the user named.
        settings: what a plan records: source, name, split, text_field, samples, seq_len, seed and
            the fingerprint of ``input_ids``.
    """

    input_ids: torch.Tensor
    source: str
    settings: dict[str, Any] = field(repr=False)


def build_calibration(
    source: str,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    model: Any = None,
    text_field: str | None = None,
    split: str | None = None,
    kept: Path | None = None,
) -> Calibration:
    """Return ``samples`` windows of exactly ``seq_len`` tokens.

    Documents are tokenised in an order shuffled by ``seed``, put one behind the other, and the
    stream is cut into windows; ``seed`` draws among at least four times as many as are needed, from
    at least twice as many documents (as far as there are so many). Documents are parted by the
    special tokens that the tokenizer adds (BOS, EOS); if it adds none, by a blank line.

    A running text (a ``.txt`` file, the rows of WikiText or Penn Treebank, documents shorter than
    ``SHORT_DOCUMENT`` characters on average) stays in its order as one document.

    Where the tokenizer adds BOS, every window starts with it.

    Args:
        source: see ``load_documents``; of ``self`` the model writes it, see ``write_windows``.
            Of several, parted by commas, each gives equally many windows (the first ones one more
            where it does not come out even), in turn.
        model: needed for ``self`` alone.
        kept: folder that keeps what the model wrote, see ``write_text_cached``; ``self`` alone.

    Raises:
        UserError: the source cannot be read, or holds too few tokens.
    """
    if samples < 1:
        raise UserError(f"samples={samples} calibrates on nothing; use at least 1")
    if seq_len < 2:
        raise UserError(f"seq_len={seq_len} predicts no token; use at least 2")
    sources = sources_of(source)
    if samples < len(sources):
        raise UserError(
            f"samples={samples} of {len(sources)} sources leave some without any; use at least "
            f"{len(sources)}"
        )
    parts: list[tuple[torch.Tensor, str, str | None]] = []
    for number, one in enumerate(sources):
        share = -(-(samples - number) // len(sources))
        size = {"samples": share, "seq_len": seq_len, "seed": seed}
        try:
            if one == SELF:
                parts.append((_written(model, tokenizer, kept, size), _SELF_NAME, None))
            else:
                parts.append(_read(one, tokenizer, split, text_field, size))
        except UserError as error:
            if len(sources) == 1:
                raise
            raise UserError(
                f"{samples} samples are {share} of each of {len(sources)} sources: {error}"
            ) from error
    turns = zip_longest(*(windows for windows, _, _ in parts))
    input_ids = torch.stack([row for turn in turns for row in turn if row is not None])
    named = ",".join(sources)
    settings = {
        "source": named,
        "name": ", ".join(name for _, name, _ in parts),
        "split": ",".join(sorted({used for _, _, used in parts if used})) or None,
        "text_field": text_field,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "fingerprint": hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()[:16],
    }
    return Calibration(input_ids, named, settings)


def _written(model: Any, tokenizer: Any, kept: Path | None, size: dict[str, int]) -> torch.Tensor:
    """Return windows that the model writes."""
    if model is None:
        raise UserError("source 'self' needs the model that writes the text")
    if kept is None:
        return write_windows(model, tokenizer, **size)
    return write_text_cached(model, tokenizer, kept, **size)


def _read(
    source: str, tokenizer: Any, split: str | None, text_field: str | None, size: dict[str, int]
) -> tuple[torch.Tensor, str, str | None]:
    """Return windows of a text, its name and its split."""
    # Enough documents even where each is one short sentence; a local file is read whole.
    local = Path(source).expanduser().exists()
    streamed = None if local else max(1000, size["samples"] * size["seq_len"] // 4)
    documents = load_documents(source, split=split, text_field=text_field, limit=streamed)
    return pack(documents, tokenizer, **size), documents.name, documents.split


def pack(
    documents: Documents, tokenizer: Any, *, samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Cut documents into windows, int64 of shape (samples, seq_len); see ``build_calibration``.

    Raises:
        UserError: there are too few tokens; says how many, and what would fit.
    """
    prefix, suffix = added_tokens(tokenizer)
    fresh = seq_len - len(prefix)  # tokens of text in a window
    if fresh < 1:
        raise UserError(f"seq_len={seq_len} holds the tokenizer's BOS alone; use a longer one")
    generator = torch.Generator().manual_seed(seed)
    needed = samples * fresh
    running = _running_text(documents)
    if running is None:
        texts = [text for text in documents.texts if text.strip()]
    else:
        texts = [running[: max(MAX_TEXT_CHARACTERS, 16 * needed)]]
    parting = "" if running is not None or prefix or suffix else "\n\n"
    stream: list[int] = []
    order = torch.randperm(len(texts), generator=generator).tolist()
    for read, position in enumerate(order, start=1):
        ids = tokenizer(texts[position] + parting, add_special_tokens=False, verbose=False)
        stream.extend((*prefix, *ids["input_ids"], *suffix))
        if read >= 2 * samples and len(stream) >= 4 * samples * seq_len and running is None:
            break
    windows, rest = _cut(stream, prefix, fresh)
    if len(windows) < samples:
        tokens = len(windows) * fresh + rest
        raise UserError(_too_short(documents.name, tokens, samples, seq_len, fresh))
    # A few windows in a row would come from one or two documents.
    drawn = sorted(torch.randperm(len(windows), generator=generator)[:samples].tolist())
    return torch.tensor([[*prefix, *windows[index]] for index in drawn], dtype=torch.int64)


def _running_text(documents: Documents) -> str | None:
    """Return the one text that the documents are parts of, None where each stands alone."""
    form = record_format(documents.records)
    if form is not None:
        return join_records(documents.records, form, "standard")
    if documents.plain or len(documents.raw) < SHORT_DOCUMENT * len(documents.texts):
        return documents.raw
    return None


def _cut(stream: list[int], prefix: tuple[int, ...], fresh: int) -> tuple[list[list[int]], int]:
    """Cut into runs of ``fresh`` tokens and the number of tokens left over.

    A prefix at a cut is skipped: the window brings its own.
    """
    windows: list[list[int]] = []
    start = 0
    while True:
        if prefix and tuple(stream[start : start + len(prefix)]) == prefix:
            start += len(prefix)
        if start + fresh > len(stream):
            return windows, len(stream) - start
        windows.append(stream[start : start + fresh])
        start += fresh


def _too_short(name: str, tokens: int, samples: int, seq_len: int, fresh: int) -> str:
    fit = tokens // fresh
    advice = (
        f"use --samples {fit} or a longer text"
        if fit
        else f"use a longer text, or windows of at most {tokens + seq_len - fresh} tokens"
    )
    return (
        f"{name} gives {tokens} tokens; {samples} samples of {seq_len} tokens need "
        f"{samples * fresh}; {advice}"
    )


def check_calibration(calibration: CalibrationSettings) -> None:
    """Raise UserError if the calibration text cannot be read."""
    if calibration.samples < 1:
        raise UserError(f"samples={calibration.samples} calibrates on nothing; use at least 1")
    if calibration.score_samples is not None and calibration.score_samples < 1:
        raise UserError(
            f"score_samples={calibration.score_samples} estimates on nothing; use at least 1"
        )
    if (calibration.score_samples or 0) > calibration.samples:
        raise UserError(
            f"score_samples={calibration.score_samples} of {calibration.samples} samples cannot be "
            "read; ask for more samples, or for fewer of them"
        )
    if calibration.seq_len < 2:
        raise UserError(f"seq_len={calibration.seq_len} predicts no token; use at least 2")
    check_number("samples", calibration.samples, 1, MOST)
    check_number("seq_len", calibration.seq_len, 2, 2**24)
    for source in sources_of(calibration.calibration):
        if source == SELF:
            continue
        # A local file is read whole, so that a broken line far down shows now. Of a dataset the
        # beginning says whether it is there.
        load_documents(
            source,
            split=calibration.text_split,
            text_field=calibration.text_field,
            limit=None if Path(source).expanduser().exists() else 1000,
        )


def read_calibration(
    loaded: LoadedModel, calibration: CalibrationSettings, seed: int, clock: Clock
) -> Calibration:
    """Return the calibration text of a run.

    Raises:
        UserError: the model has no tokenizer, or what `build_calibration` refuses.
    """
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name} has no tokenizer, so no text can be read; add one")
    text = build_calibration(
        calibration.calibration,
        loaded.tokenizer,
        samples=calibration.samples,
        seq_len=calibration.seq_len,
        seed=seed,
        model=loaded.model,
        text_field=calibration.text_field,
        split=calibration.text_split,
        kept=calibration.kept,
    )
    clock.stop("calibration text")
    return text
