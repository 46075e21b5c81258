"""Attention of packed samples, each by itself: the masks that it reads, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import llm_pruner.runtime.attention as attention
from llm_pruner.runtime.attention import Block, blocks_of, by_sample

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def positions(*rows: tuple[int, ...]) -> torch.Tensor:
    """Return positions of packed samples of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def mask_of(places: torch.Tensor) -> torch.Tensor:
    """Return the mask of packed samples, (rows, 1, n, n)."""
    sample = (places == 0).cumsum(1)
    together = sample[:, :, None] == sample[:, None]
    return (together & torch.ones_like(together).tril())[:, None]


def tiny(kind: str, **more: Any) -> Any:
    """Return a small model in eval mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **more)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def plain_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Masks that the plain attention was called with."""
    plain: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls: list[Any] = []

    def watched(*args: Any, **keywords: Any) -> Any:
        calls.append(args[4])
        return plain(*args, **keywords)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", watched)
    return calls


def test_the_samples_are_read_off_the_mask() -> None:
    mask = mask_of(positions((3, 1, 4), (8,)))
    assert blocks_of(mask, 2) == [
        Block(slice(0, 1), 0, 3),
        Block(slice(0, 1), 3, 4),
        Block(slice(0, 1), 4, 8),
        Block(slice(1, 2), 0, 8),
    ]
    assert blocks_of(mask[:1], 5) == [
        Block(slice(0, 5), 0, 3),
        Block(slice(0, 5), 3, 4),
        Block(slice(0, 5), 4, 8),
    ]


def window(mask: torch.Tensor) -> torch.Tensor:
    return mask & torch.ones_like(mask).triu(-1)


def leak(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[0, 0, 6, 1] = True
    return mask


def padded(mask: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(mask).tril()
    mask[:, :, :, 6:] = False
    return mask


def look_ahead(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[0, 0, 1, 2] = True
    return mask


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, 0.0, -torch.inf)


def by_head(mask: torch.Tensor) -> torch.Tensor:
    return mask.expand(-1, 4, -1, -1)


def longer(mask: torch.Tensor) -> torch.Tensor:
    return F.pad(mask, (2, 0), value=True)


@pytest.mark.parametrize(
    "change",
    [window, leak, padded, look_ahead, additive, by_head, longer],
    ids=lambda f: f.__name__,
)
def test_other_masks_are_left_alone(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert blocks_of(change(mask_of(positions((3, 5)))), 1) is None


@pytest.mark.parametrize("length", [1, 4, 11])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_tiles_give_what_pytorch_gives(
    length: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_TILE", 4)
    torch.manual_seed(length)
    heads = {"query": (6, 8), "key": (groups, 8), "value": (groups, 5)}
    states = [torch.randn(2, n, length, size, requires_grad=True) for n, size in heads.values()]
    upstream = torch.randn(2, 6, length, 5)
    blocks = [Block(slice(0, 2), 0, length)]
    found = attention._tiled(*states, 0.3, blocks, attention.tiles_of(blocks, 2, length))
    query, key, value = states
    key, value = (one.repeat_interleave(6 // groups, dim=1) for one in (key, value))
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for own, other in zip(
        torch.autograd.grad(found, states, upstream),
        torch.autograd.grad(wanted, states, upstream),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_tiles_leave_out_keys_that_no_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_TILE", 4)
    blocks = blocks_of(mask_of(positions((5, 7), (6, 6))), 2)
    assert blocks is not None
    tiles = attention.tiles_of(blocks, 2, 12)
    assert [(tile.queries.start, tile.keys) for tile in tiles] == [
        (0, slice(0, 4)),
        (4, slice(0, 8)),
        (8, slice(5, 12)),
    ]
    seen = torch.zeros(2, 12, 12, dtype=torch.bool)
    for tile in tiles:
        assert tile.unseen is not None
        seen[:, tile.queries, tile.keys] = ~tile.unseen
    assert torch.equal(seen, mask_of(positions((5, 7), (6, 6)))[:, 0])


@pytest.mark.parametrize("values", [8, 5])  # of another length they go a few queries at a time
@pytest.mark.parametrize("rows", [((150,), (150,)), ((70, 80), (9, 141))], ids=["whole", "packed"])
def test_forward_by_pytorch_s_kernel_gives_the_same(
    values: int, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mask = mask_of(positions(*rows))
    blocks = blocks_of(mask, 2)
    assert blocks is not None
    heads = {"query": (6, 8), "key": (2, 8), "value": (2, values)}
    sizes = [(2, n, 150, size) for n, size in heads.values()]
    states = [torch.randn(size, dtype=torch.bfloat16, requires_grad=True) for size in sizes]
    calls: list[Any] = []
    real = F.scaled_dot_product_attention
    counted = lambda *args, **others: [calls.append(others), real(*args, **others)][1]  # noqa: E731
    found = []
    for fast in (False, True):
        monkeypatch.setattr(attention, "_has_tiles", lambda fast=fast: fast)
        with monkeypatch.context() as patch:
            patch.setattr(attention.F, "scaled_dot_product_attention", counted)
            output = attention._tiled(*states, 0.3, blocks, attention.tiles_of(blocks, 2, 150))
        found.append([output, *torch.autograd.grad(output, states, torch.ones_like(output))])
    assert len(calls) == (len(blocks) if values == 8 else 0)
    exact = [one.detach().float() for one in states]
    keys, both = (one.repeat_interleave(3, dim=1) for one in exact[1:])
    wanted = real(exact[0], keys, both, attn_mask=mask, scale=0.3)
    for output, *_ in found:
        torch.testing.assert_close(output.float(), wanted, rtol=2e-2, atol=2e-2)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(one, other)


def run(model: Any, **keywords: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return logits and the gradients of all weights."""
    model.zero_grad()
    logits = model(**keywords, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), [one.grad.clone() for one in model.parameters()]


@pytest.mark.parametrize(
    "rows",
    [((7, 2, 4), (1, 12)), ((13,), (13,)), ((150,),)],
    ids=["packed", "whole", "three tiles"],
)
def test_a_model_gives_the_same(rows: Any, plain_calls: list[Any]) -> None:
    model, places = tiny("llama"), positions(*rows)
    given = {"input_ids": torch.randint(0, 50, places.shape), "position_ids": places}
    wanted, slopes = run(model, **given)
    assert len(plain_calls) == 2
    with by_sample():
        found, others = run(model, **given)
    assert len(plain_calls) == 2  # not called again
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for own, other in zip(others, slopes, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)


def cut_by_a_window() -> tuple[Any, dict[str, torch.Tensor]]:
    return tiny("mistral", sliding_window=3), {"position_ids": positions((7, 6))}


def with_padding() -> tuple[Any, dict[str, torch.Tensor]]:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    return tiny("llama"), {"attention_mask": mask}


@pytest.mark.parametrize("make", [cut_by_a_window, with_padding], ids=lambda f: f.__name__)
def test_others_go_the_plain_way(make: Callable[[], Any], plain_calls: list[Any]) -> None:
    model, given = make()
    (shape,) = (one.shape for one in given.values())
    given["input_ids"] = torch.randint(0, 50, shape)
    wanted, _ = run(model, **given)
    with by_sample():
        found, _ = run(model, **given)
    assert len(plain_calls) == 4
    assert torch.equal(found, wanted)


def test_a_mask_that_changes_is_read_again() -> None:
    samples, mask = attention._Samples(), mask_of(positions((3, 5)))
    found = samples(mask, 1, 8)
    assert found is not None
    assert [(one.start, one.end) for one in found[0]] == [(0, 3), (3, 8)]
    assert samples(mask, 1, 8) is found
    mask[0, 0, 6, 1] = True
    assert samples(mask, 1, 8) is None
