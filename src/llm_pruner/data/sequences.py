"""Token sequences to train on: how examples become them by chat template, Alpaca prompt or plain
text in windows, and what a tokenizer puts around a text or a message by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llm_pruner.data.examples import Example
from llm_pruner.errors import UserError


@dataclass(frozen=True)
class TrainingSequence:
    """One sample: tokens, and which of them the model is to learn.

    Attributes:
        input_ids: int64 of shape (length,), with the special tokens that belong to the sample.
        learned: bool of shape (length,); position t is predicted from the tokens before it, so the
            first is never learned.
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


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text without any that the tokenizer would add."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def added_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids that the tokenizer adds before and after a text.

    Attributes such as ``add_bos_token`` are missing or wrong for many tokenizers, so a text is
    encoded with and without.
    """
    whole = list(tokenizer(_PROBE)["input_ids"])
    bare = list(bare_ids(tokenizer, _PROBE))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def room_for_text(seq_len: int, prefix: tuple[int, ...]) -> int:
    """Return how many tokens of text a window has beside ``prefix``; UserError if none."""
    if seq_len <= len(prefix):
        raise UserError(f"seq_len={seq_len} holds the tokenizer's BOS alone; use a longer one")
    return seq_len - len(prefix)


_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_LATER = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"

SHORTEST = 8
"""Windows of text that are shorter than this teach little and are left out."""


_MARK = "\ue000answer\ue000"
"""In place of an answer, to find where a template writes it; of characters for private use."""

Piece = tuple[str, bool]
"""Text of a chat, and whether the assistant wrote it, or whether it is learned."""


def encode_examples(
    examples: Sequence[Example], tokenizer: Any, **how: Any
) -> list[TrainingSequence]:
    """Return the token sequences of examples in one list; see ``encode_each``."""
    return [one for each in encode_each(examples, tokenizer, **how) for one in each]


def encode_each(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    seq_len: int,
    template: Literal["auto", "chat", "alpaca"] = "auto",
    mask_prompt: bool = False,
    source: int = 0,
) -> list[list[TrainingSequence]]:
    """Return the token sequences of each example, each at most ``seq_len`` long.

    A chat is written with the tokenizer's chat template (``chat``), or as the Alpaca prompt and its
    answer (``alpaca``); ``auto`` takes the template where there is one. What is longer than
    ``seq_len`` is cut off. A text is cut into windows of ``seq_len``. Both end with the end token.
    """
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template; use --set template=alpaca")
    chat = template != "alpaca" and bool(getattr(tokenizer, "chat_template", None))
    prefix, suffix = added_tokens(tokenizer)
    ending = suffix or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    made: list[list[TrainingSequence]] = []
    for example in examples:
        if not example.turns:
            ids = [*bare_ids(tokenizer, example.text), *ending]
            made.append([*_windows(ids, prefix, seq_len, source)])
            continue
        pieces = _templated(example, tokenizer) if chat else _alpaca(example)
        marked = [(text, answer or not mask_prompt) for text, answer in pieces]
        ids, learned = _encoded(marked, tokenizer)
        if not chat:
            ids = [*prefix, *ids, *ending]
            learned = [*(False for _ in prefix), *learned, *(True for _ in ending)]
        made.append([make_sequence(ids[:seq_len], learned[:seq_len], source)])
    found = [[one for one in each if one.targets] for each in made]
    if not any(found):
        raise UserError(
            f"no example has anything to learn within {seq_len} tokens; use a longer seq_len"
            + (" or leave --mask-prompt out" if mask_prompt else "")
        )
    return [each for each in found if each]


def check_chats(examples: Sequence[Example], tokenizer: Any) -> None:
    """Raise UserError for a chat that the tokenizer's template, if there is one, rejects."""
    for example in examples if getattr(tokenizer, "chat_template", None) else ():
        _templated(example, tokenizer)


def _encoded(pieces: Sequence[Piece], tokenizer: Any) -> tuple[list[int], list[bool]]:
    text = "".join(part for part, _ in pieces)
    if all(each for _, each in pieces):
        ids = bare_ids(tokenizer, text)
        return ids, [True] * len(ids)
    if not getattr(tokenizer, "is_fast", False):
        return _encoded_by_beginnings(pieces, tokenizer)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start, end = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    # Byte-level tokenizers may leave spaces out of a token's place: a space alone has none.
    start = np.where(start < end, start, np.maximum(end - 1, 0))
    counts = np.repeat([each for _, each in pieces], [len(part) for part, _ in pieces]).cumsum()
    until = np.concatenate([[0], counts])
    learned = until[np.maximum(end, start + 1)] > until[start]
    return found["input_ids"], learned.tolist()


def _encoded_by_beginnings(pieces: Sequence[Piece], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Do as ``_encoded`` for a tokenizer without offsets, by encoding ever longer beginnings."""
    texts = [*accumulate(part for part, _ in pieces)]
    ids = bare_ids(tokenizer, texts[-1])
    learned: list[bool] = []
    for text, (_, each) in zip(texts, pieces, strict=True):
        pairs = zip(ids, bare_ids(tokenizer, text), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        learned += [each] * (same - len(learned))
    return ids, learned


def _windows(
    ids: Sequence[int], prefix: tuple[int, ...], seq_len: int, source: int
) -> Iterator[TrainingSequence]:
    fresh = room_for_text(seq_len, prefix)
    known = [False] * len(prefix)
    for start in range(0, len(ids), fresh):
        window = ids[start : start + fresh]
        if not start or len(window) >= min(SHORTEST, fresh):
            yield make_sequence([*prefix, *window], known + [True] * len(window), source)


def _alpaca(example: Example) -> Iterator[Piece]:
    before = "".join(f"{turn.content}\n\n" for turn in example.turns if turn.role == "system")
    form = _WITH_INPUT if example.context.strip() else _WITHOUT_INPUT
    turns = list(example.turns)
    while turns and turns[-1].role != "assistant":
        turns.pop()  # it teaches nothing
    for turn in turns:
        if turn.role == "assistant":
            yield turn.content, True
        elif turn.role == "user":
            yield before + form.format(instruction=turn.content, input=example.context), False
            before, form = "", _LATER


def _templated(example: Example, tokenizer: Any) -> list[Piece]:
    try:
        return _cut(example, tokenizer)
    except UserError as error:
        raise UserError(f"{example.where}: {error}".removeprefix(": ")) from error


def _cut(example: Example, tokenizer: Any) -> list[Piece]:
    messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    if example.context.strip():
        asked = next(one for one in messages if one["role"] == "user")
        asked["content"] += f"\n\n{example.context}"
    if [one["role"] for one in messages[:2]] == ["system", "user"]:
        try:
            render_chat(tokenizer, messages[:2], True)
        except UserError:  # Gemma 2 and others know no system
            told = messages.pop(0)["content"]
            messages[0]["content"] = f"{told}\n\n{messages[0]['content']}"
    pieces: list[Piece] = []
    written = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Templates take no empty chat: where the assistant begins, what it says is looked for.
        prompt = render_chat(tokenizer, messages[:position], True) if position else None
        answered = render_chat(tokenizer, messages[: position + 1], False)
        # What a template adds for generation may vanish.
        if prompt is None or not answered.startswith(prompt):
            # A mark shows where; the answer may be a part of what ends the turn.
            marked = [*messages[:position], {**message, "content": _MARK}]
            place = render_chat(tokenizer, marked, False).rfind(_MARK)
            if place < 0 or not answered[place:].lstrip().startswith(message["content"].strip()):
                raise UserError(
                    "the tokenizer's chat template changes what the assistant says; "
                    "use --set template=alpaca"
                )
            prompt = answered[:place]
        if not prompt.startswith(written):  # earlier turns are rewritten: learn the last alone
            written, pieces = "", []
        pieces += [(prompt[len(written) :], False), (answered[len(prompt) :], True)]
        written = answered
    return pieces


def template_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that the chat template writes around what is said, if it takes a chat."""
    found: set[int] = set()
    turns = [{"role": role, "content": _MARK} for role in ("system", "user", "assistant", "user")]
    chats = (turns, turns[:3], turns[1:], turns[1:3])  # without a system turn: its own
    for chat in chats if getattr(tokenizer, "chat_template", None) else ():
        with suppress(UserError):
            text = render_chat(tokenizer, chat, chat[-1]["role"] == "user")
            found.update(bare_ids(tokenizer, text))
    return found


def render_chat(tokenizer: Any, messages: list[dict[str, str]], prompting: bool) -> str:
    """Return what the chat template makes of messages, up to the next answer if ``prompting``."""
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)
        )
    except Exception as error:  # templates raise what their authors chose
        raise UserError(
            f"the tokenizer's chat template rejects a chat ({error}); "
            "use --set template=alpaca or repair the data"
        ) from error
