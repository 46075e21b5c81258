"""Training samples and held-out samples of one or several sources."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_pruner.data.examples import Examples
from llm_pruner.data.selfmade import write_text_cached
from llm_pruner.data.sequences import (
    TrainingSequence,
    encode_each,
    encode_examples,
    make_sequence,
    room_for_text,
)
from llm_pruner.data.text import PRUNED, SELF
from llm_pruner.errors import UserError

SELF_SAMPLES = 512
"""Texts that a model writes where nobody says how many."""

HELD_OUT_TOKENS = 16_384
"""Held-out tokens that perplexity and divergence are measured on."""

_SHARE, _MOST = 20, 256
"""One of this many samples is held out, and at most this many of a source."""

_LONGEST = 16
"""Characters of a token that a long text is cut by; hardly any text has so many on average."""


@dataclass(frozen=True)
class Samples:
    """What one source gives: samples to train on, and others that are only scored."""

    name: str
    split: str | None
    train: list[TrainingSequence]
    held_out: list[TrainingSequence]


def split_samples(
    examples: Examples,
    tokenizer: Any,
    *,
    limit: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
    **encoding: Any,
) -> Samples:
    """Return the samples of a source, a random part of its examples held out.

    Exact repeats are dropped, and so is what has nothing to learn. A source of few long texts gives
    its last windows. Of long examples that are held out only the first windows are scored, and the
    rest is not used.
    """
    unique = list(dict.fromkeys(examples.examples))
    if len(unique) < _SHARE:
        most = None if limit is None else _LONGEST * limit * encoding["seq_len"]
        unique = [replace(one, text=one.text[:most]) for one in unique]
        encoded = encode_examples(unique, tokenizer, **encoding)[:limit]
        return _last_held_out(encoded, examples.name, examples.split, held_out)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        unique[i]
        for i in torch.randperm(len(unique), generator=generator, device="cpu")[:limit].tolist()
    ]
    parts = encode_each(drawn, tokenizer, **encoding)
    count = _count(len(parts), held_out, examples.name)
    judged = [one for each in parts[:count] for one in each[: max(1, _MOST // count)]]
    train = _apart([*chain.from_iterable(parts[count:])], judged)
    return Samples(examples.name, examples.split, train, judged)


def _apart(
    samples: list[TrainingSequence], others: list[TrainingSequence]
) -> list[TrainingSequence]:
    spelled = {one.input_ids.tobytes() for one in others}
    return [one for one in samples if one.input_ids.tobytes() not in spelled] or samples


def self_made_samples(
    writer: Any,
    tokenizer: Any,
    folder: Path,
    *,
    seq_len: int,
    limit: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
    source: int = 0,
    name: str = SELF,
) -> Samples:
    """Return samples of text that a model writes, kept in ``folder``; see ``write_text_cached``.

    Raises UserError also if there are too few.
    """
    count = SELF_SAMPLES if limit is None else limit
    ids = write_text_cached(writer, tokenizer, folder, samples=count, seq_len=seq_len, seed=seed)
    sequences = [make_sequence(row, [True] * len(row), source) for row in ids.tolist()]
    return _last_held_out(sequences, name, None, held_out)


def held_out_windows(
    samples: Sequence[Samples], seq_len: int, prefix: tuple[int, ...] = ()
) -> torch.Tensor:
    """Return what is held out as windows for perplexity, int64 of shape (windows, window).

    The samples of a source stand one behind the other, of each source at most its equal part of
    ``HELD_OUT_TOKENS``; a short source does not make those of others fewer. A window has
    ``seq_len`` tokens, or all if they are fewer.
    """
    most = HELD_OUT_TOKENS // len(samples)
    parts = [
        np.concatenate([_without(prefix, one.input_ids) for one in each.held_out])[:most]
        for each in samples
    ]
    stream = torch.from_numpy(np.concatenate(parts))
    fresh = min(room_for_text(seq_len, prefix), len(stream))
    rows = stream[: len(stream) // fresh * fresh].view(-1, fresh)
    head = torch.tensor(prefix, dtype=torch.int64, device="cpu").expand(len(rows), len(prefix))
    return torch.cat([head, rows], dim=1)


def _without(prefix: tuple[int, ...], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return ids[len(prefix) :] if tuple(ids[: len(prefix)]) == prefix else ids


def fingerprint_samples(sequences: Sequence[TrainingSequence]) -> str:
    """Return 16 hex digits of the SHA-256 over tokens and what is learned of them."""
    digest = hashlib.sha256()
    for one in sequences:
        digest.update(len(one).to_bytes(8, "big"))
        digest.update(one.input_ids.tobytes())
        digest.update(one.learned.tobytes())
    return digest.hexdigest()[:16]


def _last_held_out(
    sequences: list[TrainingSequence], name: str, split: str | None, held_out: int | None
) -> Samples:
    count = _count(len(sequences), held_out, "self-made text" if name in (SELF, PRUNED) else name)
    judged = sequences[-count:]
    return Samples(name, split, _apart(sequences[:-count], judged), judged)


def _count(samples: int, held_out: int | None, name: str) -> int:
    count = min(max(1, samples // _SHARE), _MOST) if held_out is None else held_out
    if count >= samples:
        raise UserError(
            f"{name} gives {samples} samples and {count} of them are to be held out, so none is "
            "left to train on; use more data, or a smaller held_out or seq_len"
        )
    return count
