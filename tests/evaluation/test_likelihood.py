"""Log-likelihoods of continuations against one plain run for each."""

from __future__ import annotations

import inspect
import random
from typing import Any
from unittest import mock

import pytest
import torch

from helpers import VOCABULARY, of_tokens_alone, tiny_model
from llm_pruner.errors import UserError
from llm_pruner.evaluation import likelihood
from llm_pruner.evaluation.likelihood import Pair, Score, log_likelihoods, truncated

MAXIMUM = 48


def make_pairs(seed: int = 0, questions: int = 12) -> list[Pair]:
    """Questions with two to four answers: of one token, of many, one the start of another."""
    chance = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(least, most))]

    pairs: list[Pair] = []
    for number in range(questions):
        context = tokens(1, 30)
        if number % 3 == 0:
            answers = [tokens(1, 1) for _ in range(2)]
        else:
            answers = [tokens(1, 7) for _ in range(3)]
            answers.append([*answers[0], *tokens(1, 3)])
        pairs += [(context, answer) for answer in answers]
    pairs.append((tokens(60, 60), tokens(4, 4)))  # loses its start
    chance.shuffle(pairs)
    return pairs


def plain(model: Any, pairs: list[Pair], max_length: int) -> list[Score]:
    """Run every pair by itself."""
    scores = []
    for context, answer in pairs:
        tokens = torch.tensor([[*context, *answer][-(max_length + 1) :]])
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0, -len(answer) :]
        targets = tokens[0, -len(answer) :]
        each = logits.double().log_softmax(-1).gather(-1, targets[:, None])
        scores.append((float(each.sum()), bool((logits.argmax(-1) == targets).all())))
    return scores


def assert_same(found: list[Score], wanted: list[Score], tolerance: float = 2e-4) -> None:
    assert len(found) == len(wanted)
    for (value, greedy), (expected, expected_greedy) in zip(found, wanted, strict=True):
        assert value == pytest.approx(expected, abs=tolerance)
        assert greedy == expected_greedy


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral", "gemma3_text"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_scores_are_those_of_single_runs(family: str, batch_size: int | None) -> None:
    model, pairs = tiny_model(family), make_pairs()
    with mock.patch.object(
        likelihood._Scorer, "_continued", autospec=True, side_effect=likelihood._Scorer._continued
    ) as continued:
        found = log_likelihoods(model, pairs, max_length=MAXIMUM, batch_size=batch_size)
    assert continued.call_count > 1  # the trial, and batches
    assert_same(found, plain(model, pairs, MAXIMUM))


def test_a_model_that_takes_tokens_alone() -> None:
    pairs = make_pairs()
    found = log_likelihoods(of_tokens_alone(tiny_model()), pairs, max_length=MAXIMUM)
    assert_same(found, plain(tiny_model(), pairs, MAXIMUM))


def test_greedy_answers_are_found() -> None:
    model, (context, _) = tiny_model(), make_pairs()[0]
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    found = log_likelihoods(model, [(context, [best]), (context, [best - 1])], max_length=MAXIMUM)
    assert [greedy for _, greedy in found] == [True, False]


def test_positions_are_run_once() -> None:
    """Four answers to one text: the text is run once, and then the answers without their ends."""
    model = tiny_model()
    context = list(range(10, 40))
    pairs: list[Pair] = [(context, [start, start + 1, start + 2]) for start in (50, 60, 70, 80)]
    with mock.patch.object(likelihood._Scorer, "_can_continue", return_value=True):
        sizes = shapes_of_runs(model, pairs)
    assert sizes == [(1, 30), (4, 2)]


def test_answers_of_one_token_share_a_run() -> None:
    context = list(range(10, 40))
    assert shapes_of_runs(tiny_model(), [(context, [5]), (context, [6])]) == [(1, 30)]


def test_a_start_of_another_answer_is_read_off_it() -> None:
    context = list(range(10, 40))
    pairs: list[Pair] = [(context, [5, 6, 7]), (context, [5, 6])]
    assert shapes_of_runs(tiny_model(), pairs) == [(1, 32)]


def shapes_of_runs(model: Any, pairs: list[Pair]) -> list[tuple[int, ...]]:
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, keywords: shapes.append(tuple(keywords["input_ids"].shape)),
        with_kwargs=True,
    )
    log_likelihoods(model, pairs, max_length=MAXIMUM)
    handle.remove()
    return shapes


def test_a_model_that_misreads_its_cache_is_run_plainly() -> None:
    """Some models take one token at a time from a cache, and say nothing when given more."""
    model, pairs = tiny_model(), make_pairs()
    wanted = plain(model, pairs, MAXIMUM)
    forward = type(model).forward

    def forgetful(self: Any, *args: Any, cache: Any = None, **keywords: Any) -> Any:
        return forward(self, *args, **keywords)

    forgetful.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    with mock.patch.object(type(model), "forward", forgetful):
        assert_same(log_likelihoods(model, pairs, max_length=MAXIMUM), wanted)


def test_memory_that_runs_out_makes_batches_smaller() -> None:
    model, pairs = tiny_model(), make_pairs()
    wanted = plain(model, pairs, MAXIMUM)
    largest = []

    def small(module: Any, args: Any, keywords: dict[str, Any]) -> None:
        count = len(keywords["input_ids"])
        if count > 4:
            raise torch.OutOfMemoryError("out of memory")
        largest.append(count)

    model.register_forward_pre_hook(small, with_kwargs=True)
    assert_same(log_likelihoods(model, pairs, max_length=MAXIMUM), wanted)
    assert max(largest) <= 4


def test_what_is_too_long_is_counted_and_refused() -> None:
    pairs: list[Pair] = [([5] * 40, [6] * 9), ([5] * 40, [6] * 10)]
    assert truncated(pairs, MAXIMUM) == 1
    with pytest.raises(UserError, match="an answer of 49 tokens does not fit into the model"):
        log_likelihoods(tiny_model(), [([5], [6] * 49)], max_length=MAXIMUM)


def test_a_broken_model_is_refused() -> None:
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    with pytest.raises(UserError, match=r"text 1 of 2 is not a number; .*--dtype float32"):
        log_likelihoods(model, [([9], [6]), ([5, 7], [6])], max_length=MAXIMUM)
