"""What a model writes after a prompt."""

from __future__ import annotations

import unicodedata
from typing import Any

import torch

from llm_pruner.errors import UserError
from llm_pruner.models.forward import Decoder, evaluating


def sample_continuation(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, chat: bool = False
) -> str:
    """Return the likeliest text after the prompt, without control characters, up to its end token.

    Args:
        chat: put the prompt to the model as a user's message, in the tokenizer's chat template,
            and return the answer; without a template the prompt is continued.

    Raises:
        UserError: the prompt encodes to nothing, or the logits are not finite.
    """
    asked = chat and bool(getattr(tokenizer, "chat_template", None))
    given = encoded(tokenizer, prompt, chat=asked)
    if not given:
        raise UserError("the prompt is empty and the tokenizer adds no start token; give a prompt")
    device = next(model.parameters()).device
    ends = end_ids(model, tokenizer)
    decoder = Decoder(model)
    written: list[int] = []
    with evaluating(model):
        for _ in range(max_new_tokens):
            fresh = torch.tensor([written[-1:] or given], device=device)
            logits = decoder.step(fresh)[0].float().cpu()
            if not bool(logits.isfinite().all()):
                raise UserError("the model's logits are not finite; load it in float32 or bfloat16")
            token = int(logits.argmax())
            if token in ends:
                break
            written.append(token)
    if asked:
        return strip_control(tokenizer.decode(written, skip_special_tokens=True).lstrip())
    # Decoding the whole text and cutting the prompt off keeps the space between them.
    text = tokenizer.decode([*given, *written], skip_special_tokens=True)
    start = tokenizer.decode(given, skip_special_tokens=True)
    return strip_control(text[len(start) :])


def encoded(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Return the tokens of a prompt; of a chat, as a user's message if there is a template."""
    if not (chat and getattr(tokenizer, "chat_template", None)):
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    asked: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return asked


def strip_control(text: str) -> str:
    """Drop control and formatting characters, so that text cannot steer a terminal.

    Line feeds stay, tabs become spaces.
    """
    return "".join(
        " " if character == "\t" else character
        for character in text
        if character in "\n\t" or unicodedata.category(character)[0] != "C"
    )


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text, of the tokenizer and of the generation config."""
    generation = getattr(model, "generation_config", None)
    ends = (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None))
    lists = [each if isinstance(each, list | tuple) else [each] for each in ends]
    return {each for some in lists for each in some if isinstance(each, int)}
