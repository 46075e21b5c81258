"""Perplexity beside a slow reference; size, speed and samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from helpers import VOCABULARY, of_tokens_alone, tiny_model, tiny_tokenizer
from llm_pruner.data.sequences import bare_ids
from llm_pruner.data.text import EvaluationText
from llm_pruner.errors import UserError
from llm_pruner.evaluation import perplexity as module
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.evaluation.samples import sample_continuation, strip_control
from llm_pruner.evaluation.speed import device_name, measure_speed
from llm_pruner.files.disk import folder_bytes
from llm_pruner.models.forward import Decoder
from llm_pruner.models.layers import sharing_copy
from llm_pruner.report.text import clean
from llm_pruner.settings.evaluate import PerplexitySettings
from trained_tokenizers import byte_level

BOS = 1
TEXT = EvaluationText("words", "test", "The quick brown fox jumps over the lazy dog, twice. " * 20)


def perplexity(model: Any, tokenizer: Any, text: EvaluationText, **asked: Any) -> PerplexityResult:
    return module.perplexity(model, tokenizer, text, PerplexitySettings(**asked))


def bos_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def bytes_of(text: str) -> list[int]:
    return list(tiny_tokenizer()(text)["input_ids"])


def reference(model: Any, windows: list[list[int]], first: int) -> tuple[float, int]:
    """Mean loss and count, position by position in float64; ``first`` is predicted first."""
    model = model.double()
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(torch.tensor([window])).logits[0]
            for position in range(first, len(window)):
                row = logits[position - 1]
                losses.append(float(torch.logsumexp(row, 0) - row[window[position]]))
    model.float()
    return sum(losses) / len(losses), len(losses)


def cut(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


@pytest.mark.parametrize("protocol", ["paper", "standard"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_against_a_slow_loop(protocol: Any, adds_bos: bool) -> None:
    model = tiny_model()
    tokenizer = bos_tokenizer() if adds_bos else tiny_tokenizer()
    ids = bytes_of(TEXT.text)
    assert len(ids) == 1040
    if protocol == "paper":
        # BOS, if any, in the first window alone; the tail of 1040 = 8 * 128 + 16 is dropped.
        windows, first = cut([BOS] * adds_bos + ids, 128), 1
        seq_len, count, predicted = None, 8, 127
    elif adds_bos:
        windows, first = [[BOS, *part] for part in cut(ids, 49)], 1
        seq_len, count, predicted = 50, 21, 49
    else:
        windows, first = cut(ids, 50), 1
        seq_len, count, predicted = 50, 20, 49
    assert len(windows) == count
    nll, tokens = reference(model, windows, first)
    result = perplexity(model, tokenizer, TEXT, protocol=protocol, seq_len=seq_len, batch_size=3)
    assert result.nll == pytest.approx(nll, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert result.tokens == tokens == count * predicted
    assert (result.windows, result.window) == (count, seq_len or 128)
    assert (result.corpus, result.split, result.protocol) == ("words", "test", protocol)


def test_stderr_is_the_spread_between_windows() -> None:
    model = tiny_model()
    result = perplexity(model, tiny_tokenizer(), TEXT, seq_len=100)
    means = torch.tensor([reference(model, [part], 1)[0] for part in cut(bytes_of(TEXT.text), 100)])
    error = float(means.std()) / math.sqrt(10) * result.perplexity
    assert result.stderr == pytest.approx(error, rel=1e-4)
    assert perplexity(model, tiny_tokenizer(), TEXT, max_tokens=256).stderr is None


@pytest.mark.parametrize("protocol", ["paper", "standard"])
def test_bits_per_byte_are_of_the_whole_text(protocol: Any) -> None:
    tokenizer, text = byte_level(), EvaluationText("words", None, "naïve 語 words, twice. " * 40)
    found = perplexity(tiny_model(vocab_size=704), tokenizer, text, protocol=protocol, seq_len=50)
    tokens, size = len(bare_ids(tokenizer, text.text)), 40 * 25
    assert len(text.text.encode()) == size > tokens
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) * tokens / size)


def test_it_says_what_was_read_and_computed_in() -> None:
    def read(text: str, **asked: Any) -> tuple[str | None, ...]:
        found = perplexity(tiny_model(), tiny_tokenizer(), EvaluationText("t", None, text), **asked)
        return found.dtype, found.ids_digest, found.text_digest

    dtype, ids, text = read(TEXT.text, seq_len=40)
    assert dtype == "float32"
    assert read(TEXT.text, seq_len=40) == (dtype, ids, text)
    other = read(TEXT.text.upper(), seq_len=40)
    assert (other[1] != ids, other[2] != text) == (True, True)
    less = read(TEXT.text, seq_len=40, max_tokens=80)
    assert (less[1] != ids, less[2] != text) == (True, False)
    half = tiny_model().to(torch.bfloat16)
    assert perplexity(half, tiny_tokenizer(), TEXT, seq_len=40).dtype == "bfloat16"


def test_max_tokens_takes_the_first_tokens() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    part = perplexity(model, tokenizer, TEXT, seq_len=40, max_tokens=130)
    short = EvaluationText("words", None, TEXT.text[:120])
    assert part.windows == 3
    assert part.nll == perplexity(model, tokenizer, short, seq_len=40).nll
    # In the protocol of the paper the leading BOS counts as a token.
    assert perplexity(model, bos_tokenizer(), TEXT, protocol="paper", max_tokens=256).windows == 2


def test_the_window_is_2048_or_the_models_maximum() -> None:
    assert perplexity(tiny_model(), tiny_tokenizer(), TEXT).window == 256
    long = EvaluationText("long", None, TEXT.text * 2)
    model = tiny_model(max_position_embeddings=4096)
    assert perplexity(model, tiny_tokenizer(), long).window == 2048


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    state = torch.random.get_rng_state()
    whole = perplexity(model, tokenizer, TEXT, seq_len=64)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * VOCABULARY * 5)
    monkeypatch.setattr(module, "_LOGITS_BYTES", 1)
    assert perplexity(model, tokenizer, TEXT, seq_len=64).nll == pytest.approx(whole.nll, abs=1e-6)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("scale", "in_place"), [(1.0, False), (0.5, False), (0.5, True)])
def test_a_model_that_others_are_compared_with_runs_once(scale: float, in_place: bool) -> None:
    """Not where its logits are something else than what its output embedding gives."""
    model, runs = tiny_model("llama"), []
    batch = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        wanted = scale * model(input_ids=batch).logits

    def count(_: Any, __: Any, found: Any) -> Any:
        runs.append(found)
        if in_place:
            found.logits *= scale
        elif scale != 1:
            found.logits = scale * found.logits
        return found

    remembered = module.Remembered(model)
    model.register_forward_hook(count)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(remembered(input_ids=batch).logits, wanted)
        other = remembered(input_ids=batch[:1]).logits
    assert torch.allclose(other, wanted[:1], atol=1e-5)
    # Each run of a streamed model has a copy, and they know what others have seen.
    copies = [sharing_copy(remembered, buffers=False) for _ in range(2)]
    with torch.no_grad():
        first, second = (one(input_ids=batch[1:]).logits for one in copies)
    assert torch.equal(first, second)
    assert len(runs) == (3 if scale == 1 else 6)
    with module.evaluating(remembered):
        pass
    assert not any(part.training for part in model.modules())


def test_the_loss_is_float32_in_a_half_precision_model() -> None:
    model = tiny_model().to(torch.bfloat16)
    ids = torch.tensor(bytes_of(TEXT.text)[:128])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    exact = torch.nn.functional.cross_entropy(logits, ids[1:])
    result = perplexity(model, tiny_tokenizer(), TEXT, protocol="paper", max_tokens=128)
    assert result.nll == pytest.approx(float(exact), abs=1e-6)


def test_bad_input() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    short = EvaluationText("note", None, "x" * 100)
    with pytest.raises(
        UserError, match=r"note gives 100 tokens and one window needs 128: the text"
    ):
        perplexity(model, tokenizer, short, protocol="paper")
    with pytest.raises(UserError, match=r"the text is too short; use more text$"):
        perplexity(model, tokenizer, EvaluationText("note", None, "x"), protocol="paper")
    with pytest.raises(UserError, match="max_tokens is too small"):
        perplexity(model, tokenizer, TEXT, protocol="paper", max_tokens=100)
    with pytest.raises(UserError, match=r"300 tokens is longer .* use seq_len 256 or less"):
        perplexity(model, tokenizer, TEXT, seq_len=300)
    with pytest.raises(UserError, match="the model has 50 tokens; use the tokenizer that belongs"):
        perplexity(tiny_model(vocab_size=50), tokenizer, TEXT)


def test_a_loss_that_is_not_finite_names_the_window() -> None:
    model = tiny_model()
    text = EvaluationText("words", None, "a" * 100 + "b" * 50)
    with torch.no_grad():
        model.get_input_embeddings().weight[bytes_of("b")[0]] = torch.nan
    with pytest.raises(UserError, match="loss of window 2 of 3 of words is nan") as caught:
        perplexity(model, tiny_tokenizer(), text, seq_len=50, batch_size=2)
    assert "\n" not in str(caught.value)


def test_decoder_with_and_without_a_cache() -> None:
    model = tiny_model()
    ids = torch.tensor([bytes_of("some words")])
    cached, plain = Decoder(model), Decoder(model)
    plain._argument = None
    for tokens in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        torch.testing.assert_close(cached.step(tokens), plain.step(tokens))
    with torch.no_grad():
        torch.testing.assert_close(cached.step(ids), model(torch.cat([ids, ids], 1)).logits[:, -1])


def test_speed() -> None:
    model = tiny_model().train()
    (speed,) = measure_speed([model], prompt_tokens=8, new_tokens=4, repeats=2)
    assert speed.prefill_tokens_per_second > 0
    assert speed.decode_tokens_per_second > 0
    assert (speed.prompt_tokens, speed.new_tokens, speed.repeats) == (8, 4, 2)
    assert (speed.dtype, speed.threads) == ("float32", torch.get_num_threads())
    assert speed.device == device_name(torch.device("cpu")) != "cpu"
    assert model.training


def test_size(tmp_path: Path) -> None:
    # One block: q and o 48x48, k and v 24x48, three FFN matrices 80x48, two norms of 48.
    block = 2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48 + 2 * 48
    loose = model_size(tiny_model(tie_word_embeddings=False))
    assert loose.blocks == 3 * block
    assert loose.embedding == 2 * VOCABULARY * 48
    assert loose.total == loose.blocks + loose.embedding + 48
    assert loose.bytes == 4 * loose.total
    tied = model_size(tiny_model(tie_word_embeddings=True))
    assert tied.embedding == VOCABULARY * 48
    assert tied.total == loose.total - VOCABULARY * 48
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "sub" / "b").write_bytes(b"678")
    assert folder_bytes(tmp_path) == 8
    assert folder_bytes(tmp_path / "a") == 5


def test_sample_is_the_greedy_continuation() -> None:
    model, tokenizer = tiny_model(seed=3), tiny_tokenizer()
    ids = bytes_of("Once upon")
    for _ in range(6):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    text = tokenizer.decode(ids, skip_special_tokens=True)[len("Once upon") :]
    assert sample_continuation(model, tokenizer, "Once upon", 6) == strip_control(text)


# Vicuna's, without its system prompt: a chat template need not have tokens of its own.
VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_prompt_of_a_chat_model_is_asked_in_its_template() -> None:
    model, tokenizer = tiny_model(seed=3), tiny_tokenizer()
    tokenizer.chat_template = VICUNA
    asked = "<s>USER: Why? ASSISTANT:"
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    answer = sample_continuation(model, tokenizer, "Why?", 8, chat=True)
    continued = sample_continuation(model, tokenizer, asked, 8)
    assert answer == continued.lstrip() != ""
    assert answer != sample_continuation(model, tokenizer, "Why?", 8).lstrip()
    tokenizer.chat_template = None
    assert sample_continuation(model, tokenizer, "Why?", 8, chat=True) == sample_continuation(
        model, tokenizer, "Why?", 8
    )


def test_sample_stops_at_the_end_token() -> None:
    model, tokenizer = tiny_model(tie_word_embeddings=False), tiny_tokenizer()
    state = {"generator": torch.random.get_rng_state()}
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(
        int(model(torch.tensor([bytes_of("x")])).logits[0, -1].argmax())
    )
    assert sample_continuation(model, tokenizer, "x", 5) == ""
    assert torch.equal(state["generator"], torch.random.get_rng_state())
    with pytest.raises(UserError, match="the prompt is empty"):
        sample_continuation(model, tokenizer, "", 5)


def test_control_characters_are_stripped() -> None:
    assert strip_control("a\x1b[31mb\r\n\tc\x07\u202e\x9bd\ufffd") == "a[31mb\n\tcd\ufffd"
    joined = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f4bb"
    assert strip_control(joined) == joined == clean(joined)
    assert strip_control("a\U0001faffb") == "a\U0001faffb"  # which no version of Unicode has yet


def test_a_model_that_takes_tokens_alone() -> None:
    tokenizer = tiny_tokenizer()
    models = tiny_model(), of_tokens_alone(tiny_model())
    plain, own = (perplexity(one, tokenizer, TEXT, seq_len=50) for one in models)
    assert own.nll == pytest.approx(plain.nll)
