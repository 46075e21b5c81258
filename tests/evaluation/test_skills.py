"""Skills and health: how programs are put together, what a loop is, what the command says."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import llm_pruner as lp
import llm_pruner.commands.evaluate
import llm_pruner.evaluation.health as health_module
import llm_pruner.models.load
from command import done, run, save_tiny
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.commands.abilities import prepare
from llm_pruner.errors import UserError
from llm_pruner.evaluation import answers, skills
from llm_pruner.evaluation.answers import Answer, Asked, write_batch
from llm_pruner.evaluation.health import PERIOD, REPEATS, TOKENS, health, loops
from llm_pruner.evaluation.samples import encoded, sample_continuation, strip_control
from llm_pruner.evaluation.skills import GSM8K_METRIC, gsm8k, human_eval, human_eval_prompts, share
from llm_pruner.evaluation.zero_shot import MetricResult, TaskResult, kept
from llm_pruner.settings.evaluate import EvaluateSettings
from trained_tokenizers import MADE, byte_level

pytestmark = pytest.mark.usefixtures("cache")

PROBLEM = {
    "task_id": "t/0",
    "prompt": '\n\ndef twice(x):\n    """Return 2 x."""\n',
    "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


def answer(text: str) -> Answer:
    return Answer((), text, False)


def test_a_program_is_prompt_answer_up_to_the_stop_and_tests() -> None:
    good = "    return 2 * x\n\nprint(1 / 0)\n"
    exits = "    return 2 * x\nimport sys; sys.exit(0)\n"
    written = [answer(good), answer("    return x\n"), answer(exits)]
    found = human_eval([PROBLEM] * 3, written, total=100, dtype="float32")
    assert found.solved == share([True, False, False])
    assert found.endings == {"passed": 1, "AssertionError": 1, "SystemExit": 1}
    assert (found.total, found.shots, found.metric) == (100, 0, "pass@1")


def test_a_share_has_the_error_of_a_binomial_one() -> None:
    found = share([True] * 3 + [False])
    assert (found.value, found.count) == (0.75, 4)
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


@pytest.mark.parametrize("period", [1, 3, PERIOD])
def test_a_loop_is_a_piece_said_over_and_over(period: int) -> None:
    piece = list(range(1000, 1000 + period))
    times = max(REPEATS, -(-TOKENS // period))
    assert loops([1, 2, 3, *piece * times])
    assert not loops([1, 2, 3, *piece * times, 7])  # it came out again
    assert not loops([*piece * (times - 1)])


def test_what_is_no_loop() -> None:
    assert not loops([])
    assert not loops(list(range(256)))
    long = list(range(PERIOD + 1))
    assert not loops(long * 3)


def test_health_counts_what_loops_and_what_does_not_end() -> None:
    answers = [Answer((5,) * TOKENS, "", False), Answer((1, 2), "", True), Answer((1,), "", False)]
    asked = Asked(("a", "b", "c"), 256, "")
    found = health("built in", asked, answers, "float32")
    assert (found.looping, found.endless) == (share([True, False, False]), share([1, 0, 1]))


def test_what_is_asked_and_in_which_type_tells_results_apart() -> None:
    """Under one name, and as many of them."""
    written, other = [answer("    return 2 * x\n")], PROBLEM | {"prompt": "def twice(x):\n"}
    found = [
        human_eval([problem], written, total=9, dtype=dtype)
        for problem, dtype in ((PROBLEM, "float32"), (other, "float32"), (PROBLEM, "bfloat16"))
    ]
    long = [health("f", Asked((prompt,), 9, ""), written, "float32") for prompt in "ab"]
    sums = [
        TaskResult("g", {GSM8K_METRIC: MetricResult(0, 0, True)}, None, 1, 1, 0, "1", 0, each)
        for each in "ab"
    ]
    of = [one.digest for one in (*found, *long, *(gsm8k(one, "float32") for one in sums))]
    assert len({*of}) == len(of)
    again = human_eval([PROBLEM | {"task_id": 5}], written, total=9, dtype="float32")
    assert again.digest == of[0]


@pytest.mark.parametrize("model_type", ["llama", "rwkv"])
def test_a_batch_writes_what_each_prompt_alone_is_given(model_type: str) -> None:
    """Left padding changes nothing; penalties of the checkpoint are no part of a measurement."""
    model, tokenizer = tiny_model(model_type), tiny_tokenizer()
    prompts = ["The old bridge over the river", "A compiler", "To make soup, first"]
    model.generation_config.repetition_penalty = 5.0
    found = write_batch(model, tokenizer, prompts, Asked(tuple(prompts), 12, ""))
    assert model.generation_config.repetition_penalty == 5.0
    for one, prompt in zip(found, prompts, strict=True):
        assert strip_control(one.text) == sample_continuation(model, tokenizer, prompt, 12)


def test_a_long_prompt_shortens_no_answer_but_its_own() -> None:
    model, tokenizer = tiny_model(max_position_embeddings=64), tiny_tokenizer()
    asked = Asked((), 32, "")
    long, short = write_batch(model, tokenizer, ["a" * 60, "b"], asked)
    assert len(long.tokens) < 32
    assert short == write_batch(model, tokenizer, ["b"], asked)[0]


@pytest.mark.parametrize("kind", MADE)
def test_an_answer_keeps_the_space_that_it_begins_with(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model(vocab_size=800), MADE[kind]()
    (prompt,) = human_eval_prompts([PROBLEM]).prompts
    row = encoded(tokenizer, prompt + "    return x\n", chat=False)
    given = row[: len(encoded(tokenizer, prompt, chat=False))]
    monkeypatch.setattr(answers, "encoded", lambda *_a, **_k: given)
    written = SimpleNamespace(sequences=torch.tensor([row]))
    monkeypatch.setattr(model, "generate", lambda *_a, **_k: written)
    (found,) = write_batch(model, tokenizer, [prompt], Asked((), 12, ""))
    start = tokenizer.decode(given, skip_special_tokens=True)
    assert start + found.text == tokenizer.decode(row, skip_special_tokens=True)
    assert found.text.removeprefix("\n") == "    return x\n"


@pytest.mark.parametrize("kind", MADE)
def test_a_prompt_stays_open(kind: str) -> None:
    tokenizer = MADE[kind]()
    start, end = (tokenizer.convert_tokens_to_ids(one) for one in ("<s>", "</s>"))
    assert tokenizer("A bridge")["input_ids"][-1] == end
    given = encoded(tokenizer, "A bridge", chat=False)
    assert (given[0], end in given) == (start, False)


def test_an_answer_ends_where_the_model_does() -> None:
    model, tokenizer = tiny_model(max_position_embeddings=16), tiny_tokenizer()
    prompt = "x" * (16 - len(encoded(tokenizer, "x", chat=False)))
    room = 16 - len(encoded(tokenizer, prompt, chat=False))
    assert room > 0
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    most = sample_continuation(model, tokenizer, prompt, 100)
    assert most == sample_continuation(model, tokenizer, prompt, room)
    with pytest.raises(UserError, match="leaves no room for an answer: the model reads 16"):
        sample_continuation(model, tokenizer, prompt * 2, 100)


def test_an_end_token_ends_an_answer_and_a_stop_ends_the_writing() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    whole = write_batch(model, tokenizer, ["A bridge"], Asked((), 12, ""))[0]
    assert len(whole.tokens) == 12
    assert not whole.ended
    model.generation_config.eos_token_id = whole.tokens[4]
    first = whole.tokens.index(whole.tokens[4])
    ended = write_batch(model, tokenizer, ["A bridge", "x"], Asked((), 12, ""))[0]
    assert (ended.tokens, ended.ended) == (whole.tokens[:first], True)
    model.generation_config.eos_token_id = None
    stop = whole.text[2:4]
    stopped = write_batch(model, tokenizer, ["A bridge"], Asked((), 12, "", stops=(stop,)))[0]
    assert stop in stopped.text
    assert len(stopped.tokens) < 12


def test_prompts_of_programs_are_plain_text() -> None:
    asked = human_eval_prompts([PROBLEM])
    assert asked.prompts == (PROBLEM["prompt"].lstrip(),)
    assert not asked.chat


def result(task: str, value: float) -> TaskResult:
    metric = "acc"
    return TaskResult(task, {metric: MetricResult(value, 0.0, True)}, metric, 9, 9, 0, "1", 0)


def test_what_is_kept_is_above_chance() -> None:
    own = [result("boolq", 0.6), result("arc_easy", 0.35), result("other", 0.1)]
    dense = [result("boolq", 0.7), result("arc_easy", 0.65)]
    found = kept(own, dense, "dense")
    assert found is not None
    assert found.tasks == {"boolq": pytest.approx(0.5), "arc_easy": pytest.approx(0.25)}
    assert found.value == pytest.approx(0.2 / 0.6)
    assert found.stderr is None  # of what answers are not known of
    guessing = kept(own[:1], [result("boolq", 0.5)], "dense")
    assert guessing is not None
    assert guessing.value is None
    assert kept(own[2:], dense, "dense") is None


def answered(task: str, right: str, digest: str | None = "the same") -> TaskResult:
    """Return what the harness gives for answers that are right (1) or wrong (0)."""
    value, count = right.count("1") / len(right), len(right)
    error = math.sqrt(value * (1 - value) / (count - 1))
    metrics = {"acc": MetricResult(value, error, True)}
    return TaskResult(task, metrics, "acc", count, count, 0, "1", 0, digest, right)


def test_the_error_of_what_is_kept_is_of_pairs_of_answers() -> None:
    random = np.random.default_rng(0)
    dense = (random.random((2, 400)) < [[0.8], [0.6]]).astype(int)
    own = np.where(random.random((2, 400)) < 0.1, 1 - dense, dense)
    texts = [["".join(map(str, row)) for row in rows.tolist()] for rows in (own, dense)]
    names = ("piqa", "arc_easy")
    both = [[*map(answered, names, rows)] for rows in texts]
    found = kept(*both, "dense")
    assert found is not None
    assert found.value is not None
    assert found.stderr is not None
    # Drawn again and again from the same documents, in pairs.
    chance = np.array([[0.5], [0.25]])
    shares = []
    for _ in range(4000):
        drawn = random.integers(0, 400, (2, 400))
        above = [np.take_along_axis(rows, drawn, 1) - chance for rows in (own, dense)]
        shares.append(above[0].mean() / above[1].mean())
    assert found.stderr == pytest.approx(float(np.std(shares)), rel=0.05)
    assert found.flips == pytest.approx(float((own != dense).mean()))
    assert found.flips_stderr == pytest.approx(
        math.hypot(*(np.std(row, ddof=1) for row in (own != dense).astype(float))) / 20 / 2
    )
    # Of other documents nothing is a pair.
    others = [answered(name, text, "others") for name, text in zip(names, texts[1], strict=True)]
    apart = kept(both[0], others, "dense")
    assert apart is not None
    assert (apart.value, apart.stderr, apart.flips) == (found.value, None, None)
    same = kept(both[1], both[1], "dense")
    assert same is not None
    assert (same.value, same.stderr, same.flips, same.flips_stderr) == (1, 0, 0, 0)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A dense checkpoint and a pruned one, and problems beside them."""
    dense, small = save_tiny(tmp_path / "dense", num_hidden_layers=3), tmp_path / "small"
    cut = ("--ratio", 0.1, "--criterion", "l2", "--compensation", "none")
    done("prune", dense, "--out", small, *cut)
    lines = "\n".join(json.dumps(PROBLEM | {"task_id": f"t/{n}"}) for n in range(3))
    (tmp_path / "human_eval.jsonl").write_text(lines)
    (tmp_path / "prompts.txt").write_text("Tell me of the bridge.\n\nWhy do people sing?\n")
    return dense, small


def test_the_command_the_report_and_what_is_known_already(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = models
    loaded: list[str] = []
    alive: list[weakref.ref[Any]] = []
    load = llm_pruner.models.load.load_model

    def counted(source: str, **settings: Any) -> Any:
        gc.collect()
        assert not any(model() for model in alive)
        loaded.append(Path(source).name)
        found = load(source, **settings)
        alive.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(llm_pruner.models.load, "load_model", counted)
    monkeypatch.setattr(health_module, "ANSWER_TOKENS", 12)
    monkeypatch.setattr(skills, "_PROGRAM_TOKENS", 12)
    asked = ("--skills", "humaneval", "--run-code", "--skills-data", tmp_path, "--limit", 2)
    asked = (*asked, "--health", "--health-prompts", tmp_path / "prompts.txt", "--against", dense)
    file = tmp_path / "found.json"
    said = done("evaluate", small, *asked, "--json", file, "--report", small)
    found = json.loads(file.read_text())
    assert loaded == ["small", "dense", "small"]  # one at a time, the first time for its size
    for one in (found, found["dense"]):
        (skill,) = one["skills"]
        assert (skill["name"], skill["solved"]["count"], skill["total"]) == ("humaneval", 2, 3)
        assert one["health"]["endless"]["count"] == 2
    assert found["dense"]["model"] == "dense"
    assert "humaneval pass@1, 2 of 3 problems" in said.out
    assert "programs ran behind" in said.out
    page = (small / "report.html").read_text()
    assert "humaneval pass@1, % (2 of 3 problems)" in page
    compared = done("compare", small).out
    assert "looping answers" in compared
    loaded.clear()
    again = done("evaluate", small, *asked, "--json", "-")
    assert loaded == []
    assert json.loads(again.out) == found


def test_prompts_of_a_file_are_its_lines(tmp_path: Path) -> None:
    said = health_module.own_prompts()
    (tmp_path / "prompts.txt").write_text("\n\n".join(said) + "\n")
    asked = EvaluateSettings(model="m", health=True, health_prompts=tmp_path / "prompts.txt")
    prompts = prepare(asked).prompts
    assert prompts is not None
    assert prompts.prompts == said


@pytest.mark.parametrize(
    "asked", [("--health", "--health-prompts", "long.txt"), ("--skills", "humaneval", "--run-code")]
)
def test_a_prompt_that_is_too_long_is_refused(
    asked: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("human_eval.jsonl").write_text(json.dumps(PROBLEM | {"prompt": "x" * 99}))
    Path("long.txt").write_text(f"Why?\n{'x' * 99}\n")
    model = save_tiny(tmp_path / "m", num_hidden_layers=2, max_position_embeddings=64)
    data = ("--skills-data", tmp_path) if "--skills" in asked else ()
    result = run("evaluate", model, *asked, *data)
    assert result.code == 2
    assert "leaves no room for an answer: the model reads 64" in result.err


def test_health_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "ANSWER_TOKENS", 40)
    found = lp.health(
        lp.load(save_tiny(tmp_path / "m", num_hidden_layers=2)), ["Why do people sing?"]
    )
    assert (found.prompts, found.new_tokens, found.endless.count) == ("given", 40, 1)


def test_answers_of_a_gguf_file_and_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "ANSWER_TOKENS", 12)
    dense, file = tmp_path / "dense", tmp_path / "dense.gguf"
    tokenizer = byte_level()
    tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    done("export", dense, "--type", "f16", "--out", file)
    (tmp_path / "prompts.txt").write_text("Tell me of the bridge.\n\nWhy do people sing?\n")
    asked = ("--health", "--health-prompts", tmp_path / "prompts.txt", "--json", "-")
    alone = json.loads(done("evaluate", file, *asked).out)
    assert alone["health"]["endless"]["count"] == 2
    both = json.loads(done("evaluate", dense, *asked, "--against", file).out)
    assert both["dense"]["health"] == alone["health"]


def test_sums_are_those_of_the_harness(tmp_path: Path) -> None:
    sums = [
        {"question": f"What is {n} and 1?", "answer": f"It is so.\n#### {n + 1}"} for n in (1, 2)
    ]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, sums)))
    longer = save_tiny(tmp_path / "longer", num_hidden_layers=2, max_position_embeddings=8192)
    asked = ("--skills", "gsm8k", "--skills-data", tmp_path, "--limit", 1)
    (skill,) = json.loads(done("evaluate", longer, *asked, "--json", "-").out)["skills"]
    assert (skill["name"], skill["metric"], skill["shots"]) == ("gsm8k", "exact_match", 8)
    assert (skill["solved"]["count"], skill["total"]) == (1, 2)


def test_a_speed_needs_no_tokenizer(tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "bare", num_hidden_layers=2, max_position_embeddings=512)
    for name in bare.glob("*token*"):
        name.unlink()
    assert "decode" in done("evaluate", bare, "--speed").out
    assert "has no tokenizer" in run("evaluate", bare, "--prompt", "a").err
