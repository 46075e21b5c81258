"""Token sequences to train on, and what a tokenizer puts around a text or a message by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TrainingSequence:
    """One sample: tokens, and which of them the model is to learn.

    Attributes:
        input_ids: int64 of shape (length,), with the special tokens that belong to the sample.
        learned: bool of shape (length,); position t is predicted from the tokens before it, so the
            first is never learned.
        source: index of the source that it came from.
    """

    input_ids: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]
    source: int = 0

    @property
    def targets(self) -> int:
        """Number of tokens that are learned."""
        return int(self.learned.sum())

    def __len__(self) -> int:
        return len(self.input_ids)


def make_sequence(ids: Sequence[int], learned: Sequence[bool], source: int) -> TrainingSequence:
    """Return a sequence; its first token counts as given."""
    mask = np.array(learned, dtype=np.bool_)
    if len(mask):
        mask[0] = False
    return TrainingSequence(np.array(ids, dtype=np.int64), mask, source)


_PROBE = "a b"


def added_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids that the tokenizer adds before and after a text.

    Where the start token comes after the text (ChatGLM, which answers a context), what is added
    counts as standing before: a text by itself is an answer to nothing.

    Found by encoding a text with and without special tokens: attributes such as
    ``add_bos_token`` are missing or wrong for many tokenizers.
    """
    whole = list(tokenizer(_PROBE)["input_ids"])
    bare = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            before, after = tuple(whole[:start]), tuple(whole[start + len(bare) :])
            if getattr(tokenizer, "bos_token_id", None) in after:
                return before + after, ()
            return before, after
    return (), ()


def chat_ids(tokenizer: Any, message: str) -> list[int] | None:
    """Return the token ids that put a user's message to a chat model, up to its answer.

    None if the tokenizer has no chat template: the model continues text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": message}]
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids
