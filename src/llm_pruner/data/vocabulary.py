"""A tokenizer with fewer tokens, and which of them a text needs.

No text becomes unwritable: what all else is made of stays, so a word whose token goes is written in
smaller pieces. A token stays with the tokens that byte-pair encoding makes it of, and the order in
which pairs are merged stays as well, so that what is left is merged as before.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from llm_pruner.errors import UserError

Ids = npt.NDArray[np.int64]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_BATCH, _PIECE = 1000, 2**20
"""Texts, and characters, that are tokenised together."""


def vocabulary_of(tokenizer: Any, needed: Collection[int] = ()) -> Vocabulary:
    """Return what a tokenizer knows; tokens in ``needed`` always stay."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    kind = model.get("type") or type(tokenizer).__name__
    marks = ("end_of_word_suffix", "continuing_subword_prefix")
    if kind not in ("BPE", "Unigram") or any(map(model.get, marks)):
        raise UserError(
            f"tokens can be removed from BPE and Unigram tokenizers without word marks alone, and "
            f"this one is {kind} (end_of_word_suffix {model.get(marks[0])!r}, "
            f"continuing_subword_prefix {model.get(marks[1])!r})"
        )
    found = Vocabulary(tokenizer)
    if strange := {*needed} - found.known:
        raise UserError(
            f"the model's settings name the token {min(strange)}, which the tokenizer does not "
            "have; give the tokenizer that belongs to the model"
        )
    found.keep({*needed})
    return found


class Vocabulary:
    """What a tokenizer knows.

    Attributes:
        always: tokens that stay: added ones, single characters or bytes, and those needed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._whole = copy.deepcopy(tokenizer.backend_tokenizer)
        self._whole.no_truncation()  # as fine-tuning may have left it in the file
        self._whole.no_padding()
        self._data = json.loads(tokenizer.backend_tokenizer.to_str())
        model = self._data["model"]
        if model["type"] == "BPE":
            self._ids: dict[str, int] = model["vocab"]
            self._rank = {pair: rank for rank, pair in enumerate(map(_pair, model["merges"]))}
            made = {left + right for left, right in self._rank}
        else:
            self._ids = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
            self._rank = {}
            made = {piece for piece in self._ids if len(piece) > 1 and not _BYTE.fullmatch(piece)}
        added = {one["id"] for one in self._data["added_tokens"]}
        self.size = 1 + max([*self._ids.values(), *added])
        whole = bool(model.get("byte_fallback")) and self._ids.keys() >= _BYTES
        atoms = (
            index
            for token, index in self._ids.items()
            if (_BYTE.fullmatch(token) if whole else token not in made)
        )
        unknown = model.get("unk_id", self._ids.get(str(model.get("unk_token"))))
        self.always = {*added, *atoms, *([] if unknown is None else [unknown])}
        self.known = {*self._ids.values(), *added}
        self._tokens = {index: token for token, index in self._ids.items()}
        if whole:  # what is put for a space is read as one as a token, and not as bytes
            self.keep({*self._whole.encode(" ", add_special_tokens=False).ids})

    def keep(self, needed: set[int]) -> None:
        """Have some tokens stay, each with those that it is made of."""
        self.always |= needed.union(*map(self.parts, needed - self.always))

    def count(self, texts: Iterable[str]) -> Ids:
        """Return how often each token stands in texts, shape (size,)."""
        counts = np.zeros(self.size, np.int64)
        for batch in _batches(texts):
            for one in self._whole.encode_batch(batch, add_special_tokens=False):
                np.add.at(counts, np.array(one.ids, np.int64), 1)
        return counts

    def check(self, size: int | None) -> None:
        """Raise UserError if so many tokens are less than have to stay, or more than there are."""
        if size is not None and not len(self.always) <= size <= len(self.known):
            raise UserError(
                f"{size} tokens cannot be: {len(self.always)} have to stay, so that every text and "
                f"chat can be written, and there are {len(self.known)}; give a number in between"
            )

    def choose(self, counts: Ids, size: int | None) -> Ids:
        """Return the sorted ids of the tokens that stay: the most frequent, then the lowest ids.

        Each stays with the tokens that it is made of.
        """
        self.check(size)
        kept = set(self.always)
        order = sorted(self.known - kept, key=lambda index: (-counts[index], index))
        for index in order:
            if size is None and not counts[index]:
                break
            needed = self.parts(index) - kept
            if size is None or len(kept) + len(needed) <= size:
                kept |= needed
        return np.array(sorted(kept), np.int64)

    def parts(self, index: int) -> set[int]:
        """Return the ids of a token and of all that byte-pair encoding makes on the way to it."""
        token = self._tokens[index]
        pieces = [*token]
        made = {token, *pieces}
        while len(pieces) > 1:
            ranks = [self._rank.get(pair, -1) for pair in pairwise(pieces)]
            found = [rank for rank in ranks if rank >= 0]
            if not found:
                break
            place = ranks.index(min(found))
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
            made.add(pieces[place])
        return {self._ids[piece] for piece in made if piece in self._ids}

    def cut(self, kept: Ids) -> Any:
        """Return the tokenizer with these tokens alone, numbered in their order."""
        new = {int(old): index for index, old in enumerate(kept)}
        data = copy.deepcopy(self._data)
        model = data["model"]
        if model["type"] == "BPE":
            model["vocab"] = {token: new[i] for token, i in self._ids.items() if i in new}
            model["merges"] = [
                [left, right]
                for left, right in self._rank
                if {left, right, left + right} <= model["vocab"].keys()
            ]
        else:
            model["vocab"] = [one for i, one in enumerate(model["vocab"]) if i in new]
            model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
        for one in data["added_tokens"]:
            one["id"] = new[one["id"]]
        data["padding"] = data["truncation"] = None
        _renumber_(data["post_processor"], new)
        smaller = copy.deepcopy(self._tokenizer)
        smaller._tokenizer = Tokenizer.from_str(json.dumps(data))
        return smaller


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _renumber_(processor: Any, new: dict[int, int]) -> None:
    if isinstance(processor, list):
        for one in processor:
            _renumber_(one, new)
    if not isinstance(processor, dict):
        return
    for key, value in processor.items():
        if key == "special_tokens":
            for one in value.values():
                one["ids"] = [new[i] for i in one["ids"]]
        elif key in ("sep", "cls"):
            processor[key] = [value[0], new[value[1]]]
        else:
            _renumber_(value, new)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in batches, long ones in pieces: encodings take 40 times the memory of text."""
    batch, size = list[str](), 0
    for text in texts:
        start = 0
        while start < len(text):
            stop = start + _PIECE
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            batch.append(text[start:stop])
            size += stop - start
            start = stop
            if size >= _PIECE or len(batch) >= _BATCH:
                yield batch
                batch, size = [], 0
    yield batch
