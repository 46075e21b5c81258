"""What a model writes after many prompts: greedy, in batches, each batch kept when it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from llm_pruner.errors import UserError
from llm_pruner.evaluation import result_cache
from llm_pruner.evaluation.samples import continuation, encoded, end_ids
from llm_pruner.models.forward import evaluating, maximum_length
from llm_pruner.models.load import LoadedModel
from llm_pruner.runtime.progress import quiet, track

BATCH = 16
"""Prompts at once, where nobody says how many."""
_TAIL = 12  # tokens in which a text that stops a program is looked for
_ROUNDING = 0.05
"""Part of the spread of a token's logits by which rounding moves them, at most."""


@dataclass(frozen=True)
class Answer:
    """What was written after a prompt."""

    tokens: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Asked:
    """Prompts, and how long an answer may be."""

    prompts: tuple[str, ...]
    new_tokens: int
    title: str
    chat: bool = False
    stops: tuple[str, ...] = ()


def written(
    asked: Asked,
    load: Callable[[], LoadedModel],
    batch_size: int | None = None,
    key: Callable[..., str | None] = lambda **_: None,
) -> list[Answer]:
    """Return a greedy answer to each prompt; the model is loaded only for answers not kept yet.

    ``key`` gives the name under which answers are kept, from what they depend on beside the model;
    None where nothing is kept. Raises UserError if a prompt leaves no room for an answer.
    """
    size = batch_size or BATCH
    batches = [asked.prompts[start : start + size] for start in range(0, len(asked.prompts), size)]

    def answers() -> Iterator[Answer]:
        for batch in batches:
            name = key(what="continuations", **asdict(replace(asked, prompts=batch)))
            found = _kept(name, len(batch))
            if found is None:
                loaded = load()
                found = write_batch(loaded.model, loaded.tokenizer, batch, asked)
                if name is not None:
                    kept = [[one.tokens, one.text, one.ended] for one in found]
                    result_cache.write(name, {"answers": kept})
            yield from found

    return list(track(answers(), asked.title, len(asked.prompts)))


def _kept(name: str | None, count: int) -> list[Answer] | None:
    kept: Mapping[str, Any] = (name and result_cache.read(name)) or {}
    try:
        found = [Answer(tuple(tokens), text, ended) for tokens, text, ended in kept["answers"]]
    except (KeyError, TypeError, ValueError):
        return None
    return found if len(found) == count else None


@torch.no_grad()
def write_batch(model: Any, tokenizer: Any, prompts: Sequence[str], asked: Asked) -> list[Answer]:
    """Return an answer to each prompt of a batch; see ``written``."""
    rows = [encoded(tokenizer, prompt, chat=asked.chat) for prompt in prompts]
    if not min(map(len, rows)):
        raise UserError("a prompt has no tokens, so nothing can follow it; write something in it")
    longest = max(map(len, rows))
    limit, ends = maximum_length(model), end_ids(model, tokenizer)
    padding = min(ends, default=0)
    # The answer to a long prompt may end early, and those to others are not to end with it.
    early = limit is not None and limit - longest < asked.new_tokens
    if len(rows) > 1 and (early or sees_padding(model, rows, padding)):
        alone = [write_batch(model, tokenizer, [prompt], asked) for prompt in prompts]
        return [answer for [answer] in alone]
    room = asked.new_tokens if limit is None else min(asked.new_tokens, limit - longest)
    if room < 1:
        raise UserError(
            f"a prompt of {longest} tokens leaves no room for an answer: the model reads {limit}; "
            "use shorter prompts"
        )
    stops = [_Stops(tokenizer, asked.stops, longest)] if asked.stops else []
    out = _generate(
        model,
        rows,
        longest,
        max_new_tokens=room,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
        stopping_criteria=StoppingCriteriaList(stops),
    )
    found = out.sequences[:, longest:].tolist()
    return [_answer(tokenizer, *each, ends) for each in zip(rows, found, strict=True)]


def _generate(model: Any, rows: Sequence[list[int]], length: int, **settings: Any) -> Any:
    """Return what ``generate`` does, greedily, after rows that are padded to a length."""
    device, padding = next(model.parameters()).device, settings["pad_token_id"]
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows], device="cpu")
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device="cpu")
    with evaluating(model), _plainly(model), quiet("transformers"):
        return model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            return_dict_in_generate=True,
            **settings,
        )


def sees_padding(model: Any, rows: Sequence[list[int]], padding: int) -> bool:
    """Whether padding changes the logits behind a row: recurrences without a mask read it."""
    shortest, longest = min(rows, key=len), max(map(len, rows))
    if len(shortest) == longest:
        return False
    first = partial(_generate, max_new_tokens=1, pad_token_id=padding, output_logits=True)
    padded, alone = (
        first(model, [shortest], length).logits[0][0].float() for length in (longest, len(shortest))
    )
    return bool((padded - alone).norm() > _ROUNDING * (alone - alone.mean()).norm())


def _answer(tokenizer: Any, prompt: list[int], tokens: list[int], ends: set[int]) -> Answer:
    length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text = continuation(tokenizer, prompt, tokens[:length])
    return Answer(tuple(tokens[:length]), text, length < len(tokens))


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Let ``generate`` know nothing of the checkpoint's generation config, such as penalties."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Stops(StoppingCriteria):
    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int) -> None:
        self.tokenizer, self.texts, self.start = tokenizer, texts, start

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        tails = self.tokenizer.batch_decode(
            input_ids[:, max(self.start, len(input_ids[0]) - _TAIL) :],
            clean_up_tokenization_spaces=False,
        )
        done = [any(text in tail for text in self.texts) for tail in tails]
        return torch.tensor(done, device=input_ids.device)
