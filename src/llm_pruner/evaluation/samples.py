"""What a model writes after a prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import cycle
from typing import Any

import torch
from jinja2 import TemplateError

from llm_pruner.data.sequences import added_tokens
from llm_pruner.errors import UserError, in_short
from llm_pruner.models.forward import Decoder, evaluating, maximum_length


def sample_continuation(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, chat: bool = False
) -> str:
    """Return the likeliest text after the prompt, without control characters, up to its end token.

    Tabs are spaces, as of a sample that is read in a table.
    """
    asked = chat and has_template(tokenizer)
    given = encoded(tokenizer, prompt, chat=asked)
    check_prompt(model, tokenizer, prompt, chat=chat)
    limit = maximum_length(model)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - len(given))
    ends = end_ids(model, tokenizer)
    with evaluating(model):
        written = list(write(Decoder(model), given, max_new_tokens, ends))
    read = (
        _decode(tokenizer, written).lstrip() if asked else continuation(tokenizer, given, written)
    )
    return strip_control(read).replace("\t", " ")


def check_prompt(model: Any, tokenizer: Any, prompt: str, *, chat: bool = False) -> None:
    """Raise UserError if a prompt leaves no room for an answer in what the model reads."""
    given, limit = encoded(tokenizer, prompt, chat=chat), maximum_length(model)
    if limit is not None and len(given) >= limit:
        raise UserError(
            f"a prompt of {len(given)} tokens leaves no room for an answer: the model reads "
            f"{limit}; use a shorter one"
        )


def write(
    decoder: Decoder,
    given: Sequence[int],
    most: int,
    ends: Set[int],
    choose: Callable[[torch.Tensor], int] = lambda logits: int(logits.argmax()),
) -> Iterator[int]:
    """Yield at most so many tokens that a model writes, up to one that ends a text.

    What ``decoder`` has read stands before. ``choose`` gets float32 logits (V,) and returns a
    token, by default the likeliest. Raises UserError if nothing is given, or logits are not finite.
    """
    if not given:
        raise UserError("the prompt is empty and the tokenizer adds no start token; give a prompt")
    device = next(decoder.model.parameters()).device
    for _ in range(most):
        logits = decoder.step(torch.tensor([given], device=device))[0].float().cpu()
        if not bool(logits.isfinite().all()):
            raise UserError("the model's logits are not finite; load it in float32 or bfloat16")
        token = choose(logits)
        if token in ends:
            return
        yield token
        given = [token]


def continuation(tokenizer: Any, given: Sequence[int], written: Sequence[int]) -> str:
    """Return as text what was written after the tokens given, with a space that decoding drops."""
    return _decode(tokenizer, [*given, *written])[len(_decode(tokenizer, given)) :]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode([*ids], **how))


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how a chat is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def encoded(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Return the tokens of a prompt, or a user's message where there is a template; no end."""
    if chat and has_template(tokenizer):
        return encoded_chat(tokenizer, [prompt])
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    return ids[: len(ids) - len(added_tokens(tokenizer)[1])]


def encoded_chat(tokenizer: Any, said: Sequence[str]) -> list[int]:
    """Return the tokens of a chat up to the beginning of the next answer.

    The user, first and last, and the model have ``said`` in turns. UserError if the template fails.
    """
    messages = [
        {"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), said)
    ]
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
        )
    except TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template fails ({in_short(error)}); correct it in the folder"
        ) from error


def strip_control(text: str) -> str:
    """Drop control and formatting characters, so that text cannot steer a terminal.

    Line feeds and tabs stay, the joiners of which Persian, Hindi and some pictures are made, and
    characters that are younger than Python's tables.
    """
    return "".join(
        character
        for character in text
        if character in "\n\t\u200c\u200d"
        or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co")
    )


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text, of the tokenizer and of the generation config."""
    generation = getattr(model, "generation_config", None)
    ends = (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None))
    lists = [each if isinstance(each, list | tuple) else [each] for each in ends]
    return {each for some in lists for each in some if isinstance(each, int)}
