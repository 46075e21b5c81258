"""Text that a model writes, for calibration and recovery: no outside data at all."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llm_pruner.data.sequences import added_tokens, bare_ids
from llm_pruner.data.text import CHAT, SELF
from llm_pruner.data.turns import Turns
from llm_pruner.errors import UserError
from llm_pruner.files.disk import new_file
from llm_pruner.models.forward import (
    Decoder,
    cache_argument,
    check_length,
    embedding_rows,
    evaluating,
    make_room_,
    maximum_length,
    repeat_,
    tensor_bytes,
)
from llm_pruner.models.layers import own_copy
from llm_pruner.models.streaming import forget_pages, is_model_streamed, room_for, values_of
from llm_pruner.runtime.memory import free_bytes
from llm_pruner.runtime.precision import multiplies_bfloat16
from llm_pruner.runtime.progress import track

_LOG = logging.getLogger(__name__)

PIECE = 512
"""Tokens of a text at most. On SmolLM2-135M texts of 512 calibrate better than of 128."""
TOKENS, TEXTS = 8192, 64
"""Texts of so many tokens are written together at least; and so many texts, if these are more and
``CACHE`` has room for them."""
CACHE = 2**31
"""Bytes that the cache of keys and values may take: a step of many texts costs little more than one
of few."""
CHUNK = TEXTS
"""Sequences that are written, and kept, at a time."""
LARGE = 50_000_000
"""Parameters from which on a copy in bfloat16 writes faster than it is made."""
_BLOCK = 256
"""Tokens of a vocabulary whose shares are added up before one of them is drawn."""
_BELOW_1 = 1 - 2.0**-50
"""So much that a product with it is smaller than the other factor."""
_NOTHING = torch.empty(0, dtype=torch.int64, device="cpu")
_WORD = re.compile(r"[A-Z][a-z]+")


@torch.no_grad()
def write_text(
    model: Any,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    batch_size: int | None = None,
    turns: Turns | None = None,
) -> torch.Tensor:
    """Sample ``samples`` sequences of ``seq_len`` tokens, int64 of that shape, on the CPU.

    A sequence starts with what the tokenizer adds before a text (BOS), or else with a token that is
    a whole capitalised word, drawn evenly; the model reads a blank line before it. Special tokens
    are never drawn. Each sequence has its own random numbers, drawn ahead from one generator, so
    that the batch size does not change them; the global random state is not touched.

    With ``turns`` a sequence is a chat: questions and answers by turns. The tokens that end a turn
    are drawn as others are.
    """
    check_length(model, seq_len)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    if turns is None:
        starts, lead = _starts(model, tokenizer, samples, generator)
    else:
        starts, lead = turns.opening.expand(samples, -1), _NOTHING
    if starts.shape[1] > seq_len:
        what = "tokenizer's BOS" if turns is None else "opening of a chat"
        raise UserError(f"seq_len={seq_len} holds the {what} alone; use a longer one")
    uniform = torch.rand(samples, seq_len, generator=generator, dtype=torch.float64, device="cpu")
    ids = torch.empty(samples, seq_len, dtype=torch.int64, device="cpu")
    ids[:, : starts.shape[1]] = starts
    positions = range(starts.shape[1], seq_len)
    given, model = model, _fast(model)
    with evaluating(model):
        opening = torch.cat([lead, starts[0]])[None].to(device)
        batch_size = batch_size or _texts_at_a_time(model, opening, seq_len)
        batches = range(0, samples, batch_size)
        if is_model_streamed(model):
            _LOG.warning(
                "the model is read block by block for each of %d tokens that it writes; a text, "
                "such as --calibration FILE, is faster",
                len(batches) * len(positions),
            )
        steps = ((batch, position) for batch in batches for position in positions)
        for first, position in track(steps, "Writing text", total=len(batches) * len(positions)):
            rows = slice(first, min(first + batch_size, samples))
            if position == positions.start:
                texts = ids[rows, :position]
                opened = torch.cat([lead.expand(len(texts), -1), texts], dim=1)
                decoder, logits = _opened(model, opened.to(device), len(lead) + seq_len)
                never = _barred(tokenizer, turns, logits.shape[-1])
                if turns is not None:
                    turns.start(len(texts), seq_len)
            else:
                logits = decoder.step(ids[rows, position - 1 : position].to(device))
            drawn = draw_tokens(logits.float().cpu(), uniform[rows, position], never)
            ids[rows, position] = drawn if turns is None else turns.follow(drawn)
    forget_pages(given)
    return ids


def _barred(tokenizer: Any, turns: Turns | None, tokens: int) -> torch.Tensor:
    """Return the tokens, of so many that have a logit, that are never drawn; none if it were all.

    These are special tokens, but for those that end a turn, and rows that stand for no token.
    """
    special = _special_ids(tokenizer) - (set() if turns is None else turns.ends)
    barred = sorted({one for one in special if one < tokens} | {*range(len(tokenizer), tokens)})
    return torch.tensor(barred if len(barred) < tokens else [], dtype=torch.int64, device="cpu")


def _opened(model: Any, texts: torch.Tensor, tokens: int) -> tuple[Decoder, torch.Tensor]:
    """Return a decoder that has read how texts begin, (texts, T), and the logits after that.

    Chats begin alike: what their template says first is read once.
    """
    decoder = Decoder(model)
    alike = texts.shape[1] > 1 and bool((texts == texts[0]).all())
    logits = decoder.step(texts[:1] if alike else texts)
    if alike and repeat_(decoder.cache, len(texts)):
        logits = logits.expand(len(texts), -1)
    elif alike and len(texts) > 1:
        decoder = Decoder(model)
        logits = decoder.step(texts)
    make_room_(decoder.cache, tokens)
    return decoder, logits


def write_windows(
    model: Any, tokenizer: Any, *, samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Return windows of text, int64 of shape (samples, seq_len).

    A window longer than ``PIECE`` has several texts, parted as documents are.
    """
    check_length(model, seq_len)
    if seq_len <= PIECE:
        return write_text(model, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    prefix, suffix = added_tokens(tokenizer)
    parting = [*suffix] if prefix or suffix else _blank_line(tokenizer)
    count = -(-seq_len // (PIECE + len(parting)))
    texts = write_text(model, tokenizer, samples=samples * count, seq_len=PIECE, seed=seed)
    parted = torch.tensor(parting, dtype=torch.int64, device="cpu").expand(len(texts), -1)
    return torch.cat([texts, parted], dim=1).reshape(samples, -1)[:, :seq_len].contiguous()


def write_chats(
    model: Any, tokenizer: Any, *, samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Return windows of chats of ``PIECE`` tokens, int64 of shape (samples, seq_len)."""
    windows = max(1, min(PIECE, maximum_length(model) or PIECE) // seq_len)
    how = {"samples": -(-samples // windows), "seq_len": windows * seq_len, "seed": seed}
    chats = write_text(model, tokenizer, turns=Turns(tokenizer), **how)
    return chats.reshape(-1, seq_len)[:samples].contiguous()


def faster_in_bfloat16(parameters: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a copy in bfloat16 writes faster than a model that computes in a type, so large."""
    wide = dtype == torch.float32
    return wide and parameters >= LARGE and multiplies_bfloat16(device)


def _fast(model: Any) -> Any:
    """Return a copy whose weights, not buffers, are bfloat16 where the processor is faster with it.

    Of a model that is read block by block the copy has all weights in memory, if they fit.
    """
    weights = [*model.parameters()]
    count, device = sum(one.numel() for one in weights), weights[0].device
    if (
        any(one.dtype != torch.float32 for one in weights)
        or not faster_in_bfloat16(count, torch.float32, device.type)
        or (is_model_streamed(model) and 2 * count > room_for(model))
        or (device.type == "cuda" and 2 * count > free_bytes(str(device)))
    ):
        return model
    kind = torch.bfloat16
    memo = {id(one): nn.Parameter(values_of(one, kind).to(kind)) for one in weights}
    return own_copy(model, memo)


def _texts_at_a_time(model: Any, opening: torch.Tensor, seq_len: int) -> int:
    fewest = max(1, TOKENS // seq_len)
    if fewest >= TEXTS or cache_argument(model) is None:
        return fewest
    decoder = Decoder(model)
    decoder.step(opening)
    before = tensor_bytes(decoder.cache)
    decoder.step(opening[:, -1:])
    after = tensor_bytes(decoder.cache)
    if not after:
        return fewest
    return max(fewest, min(TEXTS, CACHE // (before + (after - before) * seq_len)))


def draw_tokens(logits: torch.Tensor, uniform: torch.Tensor, barred: torch.Tensor) -> torch.Tensor:
    """Return one token a row by inverting the cumulative distribution at ``uniform``.

    Unlikely tokens are not cut off (as by arXiv 2407.01082): text without them is so poor in words
    that other units look important.
    """
    share = torch.softmax(logits.index_fill(1, barred, -torch.inf), dim=-1)
    whole = share.shape[1] // _BLOCK * _BLOCK
    parts = (share[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1), share[:, whole:].sum(-1)[:, None])
    blocks = torch.cat(parts, dim=1)
    if not bool(blocks.isfinite().all()):
        raise UserError(
            "the model's logits are not finite while it writes calibration text; load it "
            "in float32 or bfloat16, or give a text as calibration data"
        )
    # Cumulative sums over all of a large vocabulary would take as long as a small model does.
    block, uniform = _drawn(blocks, uniform)
    tokens = block[:, None] * _BLOCK + torch.arange(_BLOCK, device="cpu")
    inside = share.gather(1, tokens.clamp(max=share.shape[1] - 1)) * (tokens < share.shape[1])
    return block * _BLOCK + _drawn(inside, uniform)[0]


def _drawn(share: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where in each row the cumulative share exceeds ``uniform`` of all of it, and how far
    in that place, from 0 to 1.
    """
    cumulative = share.cumsum(dim=-1, dtype=torch.float64)
    target = uniform.clamp(0, _BELOW_1)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    within = 1 - (cumulative.gather(1, place) - target) / share.gather(1, place)
    return place[:, 0], within[:, 0]


def _starts(
    model: Any, tokenizer: Any, samples: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how each text starts, (samples, tokens), and the token read before it, (1,) or (0,).

    Many models use the first token of all as an attention sink: a word there would say nothing
    about what follows.
    """
    prefix, _ = added_tokens(tokenizer)
    if prefix:
        return torch.tensor(prefix, dtype=torch.int64, device="cpu").expand(samples, -1), _NOTHING
    words = torch.tensor(
        words_of(tokenizer, embedding_rows(model)), dtype=torch.int64, device="cpu"
    )
    rounds = [
        torch.randperm(len(words), generator=generator, device="cpu")
        for _ in range(-(-samples // len(words)))
    ]
    lead = torch.tensor(_blank_line(tokenizer)[-1:], dtype=torch.int64, device="cpu")
    return words[torch.cat(rounds)[:samples]][:, None], lead


def _blank_line(tokenizer: Any) -> list[int]:
    return bare_ids(tokenizer, "\n\n")


def words_of(tokenizer: Any, vocabulary: int) -> list[int]:
    """Return tokens that stand for a capitalised word; any plain token where there is none."""
    special = _special_ids(tokenizer)
    plain = [index for index in range(min(vocabulary, len(tokenizer))) if index not in special]

    def is_word(index: int) -> bool:
        text = tokenizer.decode([index])
        # Encoding it again keeps pieces from inside words away.
        return bool(_WORD.fullmatch(text)) and bare_ids(tokenizer, text) == [index]

    return [index for index in plain if is_word(index)] or plain or [0]


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


WRITERS = {SELF: write_windows, CHAT: write_chats}
"""By the name of the source."""


def write_text_cached(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    source: str = SELF,
) -> torch.Tensor:
    """Return what the source's writer does, ``CHUNK`` windows at a time, each kept in ``folder``.

    What was written before an interruption is read again. The folder belongs to one model, length
    and seed; more samples continue it.
    """
    name = "" if source == SELF else f"{source}-"
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for number in range(-(-samples // CHUNK)):
        file = folder / f"{name}{seq_len}-{seed}-{number:05d}.safetensors"
        if not file.is_file():
            # Whole chunks, so that they do not depend on how many samples are asked for.
            ids = WRITERS[source](
                model, tokenizer, samples=CHUNK, seq_len=seq_len, seed=seed + 1_000_003 * number
            )
            with new_file(file) as partial:
                save_file({"input_ids": ids}, partial)
        chunks.append(load_file(file)["input_ids"])
    return torch.cat(chunks)[:samples]
