"""What a model writes after a prompt."""

from __future__ import annotations

import unicodedata
from typing import Any

import torch

from llm_pruner.errors import UserError
from llm_pruner.models.decode import Decoder
from llm_pruner.models.special_tokens import chat_ids


def sample_continuation(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    seed: int = 0,
    *,
    temperature: float = 0.0,
    chat: bool = False,
) -> str:
    """Return the text after the prompt, without control characters, up to the end token.

    Args:
        seed: seed of the draws; without effect at temperature 0.
        temperature: 0 takes the likeliest token, else tokens are drawn.
        chat: put the prompt to the model as a user's message, in the tokenizer's chat template,
            and return the answer; without a template the prompt is continued.

    Raises:
        UserError: the prompt encodes to nothing, or the logits are not finite.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} writes nothing; use at least 1")
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative; use 0 or more")
    asked = chat_ids(tokenizer, prompt) if chat else None
    if asked is None:
        ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
    else:
        ids = torch.tensor([asked])
    if ids.numel() == 0:
        raise UserError("the prompt is empty and the tokenizer adds no start token; give a prompt")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ends = _end_ids(model, tokenizer)
    decoder = Decoder(model)
    training = model.training
    model.eval()
    written: list[int] = []
    try:
        tokens = ids.to(torch.int64)
        for _ in range(max_new_tokens):
            logits = decoder.step(tokens.to(device))[0].float().cpu()
            if not bool(logits.isfinite().all()):
                raise UserError("the model's logits are not finite; load it in float32 or bfloat16")
            token = _choose(logits, temperature, generator)
            if token in ends:
                break
            written.append(token)
            tokens = torch.tensor([[token]])
    finally:
        model.train(training)
    if asked is not None:
        return strip_control(tokenizer.decode(written, skip_special_tokens=True).lstrip())
    # Decoding the whole text and cutting the prompt off keeps the space between them.
    text = tokenizer.decode([*ids[0].tolist(), *written], skip_special_tokens=True)
    start = tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
    return strip_control(text[len(start) :])


def strip_control(text: str) -> str:
    """Drop control and formatting characters, so that text cannot steer a terminal.

    Line feeds stay, tabs become spaces.
    """
    return "".join(
        " " if character == "\t" else character
        for character in text
        if character in "\n\t" or unicodedata.category(character)[0] != "C"
    )


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    share = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(share, 1, generator=generator))


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    ends: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for value in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
        if isinstance(value, int):
            ends.add(value)
        elif isinstance(value, (list, tuple)):
            ends.update(value)
    return ends
