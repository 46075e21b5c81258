"""``llm-pruner chat``: lines of a pipe, a terminal, history, and what breaks off."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_pruner.cli.chat as cli
from command import Result, run
from helpers import tiny_model, tiny_tokenizer
from llm_pruner.commands.chat import Conversation, ask
from llm_pruner.evaluation.samples import sample_continuation
from llm_pruner.models.load import load_model
from llm_pruner.settings.chat import ChatSettings

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for one in messages %}<{{ one.role }}>{{ one.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENS = ("--new-tokens", 12)


def saved(folder: Path, seed: int, template: str | None) -> Path:
    """Save a model that writes small letters, so that its answers are tokenized as they came."""
    model = tiny_model(seed=seed, initializer_range=0.3, max_position_embeddings=200)
    tokenizer = tiny_tokenizer()
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    others = [token for token in range(len(tokenizer)) if token not in letters]
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models that chat and one that continues texts."""
    folder = tmp_path_factory.mktemp("chat")
    saved(folder / "small", 0, TEMPLATE)
    saved(folder / "dense", 1, TEMPLATE)
    saved(folder / "plain", 0, None)
    return folder


@pytest.fixture
def work(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


class Terminal(io.StringIO):
    """A terminal on which lines are typed; what is raised stands among them as ``^C``."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:
        line = super().readline()
        if line == "^C\n":
            os.kill(os.getpid(), signal.SIGINT)
        return line


def chat(monkeypatch: pytest.MonkeyPatch, typed: str, *args: object) -> Result:
    """Run the command with lines of a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return run("chat", *args)


def talk(monkeypatch: pytest.MonkeyPatch, typed: str, *args: object) -> Result:
    """Run the command in a terminal."""
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "dumb")
    return run("chat", *args)


def conversation(folder: Path, **settings: Any) -> Conversation:
    loaded = load_model(str(folder))
    return Conversation(loaded, "it", ChatSettings(model="it", new_tokens=12, **settings))


def said(one: Conversation, line: str) -> str:
    *_, turn = ask([one], line)
    return turn.answers["it"].text


def test_a_pipe_gets_the_answers_alone(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = chat(monkeypatch, "What?\n", "small", *TOKENS)
    loaded = load_model("small")
    wanted = sample_continuation(loaded.model, loaded.tokenizer, "What?", 12, chat=True)
    assert (result.code, result.out, result.err) == (0, f"{wanted}\n", "")
    assert len(wanted) == 12
    both = chat(monkeypatch, "What?", "small", "--against", "dense", *TOKENS).out.splitlines()
    assert both[:3] == ["small:", wanted, "dense:"]
    assert len(both) == 4
    assert both[3] != wanted


def test_json_holds_the_session(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "What?\n\nAnd?\n/new\nWhat?\n/quit\nMore?\n"
    result = chat(monkeypatch, lines, "small", "--json", "-", *TOKENS)
    turns = json.loads(result.out)
    assert [turn["question"] for turn in turns] == ["What?", "And?", "What?"]
    first, second, third = (turn["answers"]["small"] for turn in turns)
    assert first["text"] == third["text"] != second["text"]
    assert first["tokens"] == 12
    assert min(first["first"], first["seconds"]) > 0


@pytest.mark.parametrize("name", ["small", "plain"])
def test_history_and_what_is_read_of_it(place: Path, name: str) -> None:
    one = conversation(place / name)
    loaded = load_model(str(place / name))
    read: list[int] = []
    one._model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: read.append(given[0].shape[1])
    )
    first, second = said(one, "What?"), said(one, "And?")
    if name == "small":
        text = f"<user>What?\n<assistant>{first}\n<user>And?\n<assistant>"
    else:
        text = f"What?{first}\nAnd?"
    assert second == sample_continuation(loaded.model, loaded.tokenizer, text, 12)
    asked = text.index(first)
    # The last letter of the first answer was not read before.
    assert read == [asked, *[1] * 11, len(text) - asked - 11, *[1] * 11]


def test_a_broken_reading_is_not_built_upon(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = conversation(place / "small"), conversation(place / "small")
    layer = one._model.base_model.layers[-1]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    turns = ask([one], "What?")
    for _ in range(4):
        turn = next(turns)
    hook = layer.register_forward_pre_hook(stop)  # the other layers have read one token more
    with pytest.raises(KeyboardInterrupt):
        next(turns)
    hook.remove()
    begun = turn.answers["it"].text
    assert len(begun) == 3
    other._said = ["What?", begun]
    assert said(one, "And?") == said(other, "And?")


def test_a_terminal(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = conversation(work / "small")
    first, second = said(answer, "What?"), said(answer, "And?")
    shown = talk(monkeypatch, "What?\n/help\nAnd?\n", "small", *TOKENS)
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert "/new begins another conversation, /quit ends, Ctrl-C breaks an answer off" in lines[0]
    assert lines[1] == f"> {first}"
    assert "12 tokens, " in lines[2]
    assert " tokens/s, the first after 0." in lines[2]
    assert "/help is no command" in lines[3]
    assert lines[4] == f"> {second}"
    ended = talk(monkeypatch, "^C\nWhat?\n", "small", *TOKENS)
    assert ended.code == 0
    assert "tokens" not in ended.out


def test_two_models_in_a_terminal(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [said(conversation(work / name), "What?") for name in ("small", "dense")]
    shown = talk(monkeypatch, "What?\n/quit\n", "small", "--against", "dense", *TOKENS).out
    lines = shown.splitlines()[1:]
    assert lines[0].endswith("small:")
    assert [lines[1], lines[3], lines[4]] == [answers[0], "dense:", answers[1]]
    assert shown.count("12 tokens, ") == shown.count(" tokens/s") == 2


def test_an_answer_that_is_broken_off_stays(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = cli.clean, 0

    def clean(*args: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 4:  # in each step one
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(cli, "clean", clean)
    result = talk(monkeypatch, "What?\nAnd?\n", "small", "--json", "turns.json", *TOKENS)
    assert result.code == 0
    turns = json.loads(Path("turns.json").read_text())
    tokens = [turn["answers"]["small"]["tokens"] for turn in turns]
    assert tokens[0] < tokens[1] == 12
    Path("turns.json").unlink()


def test_too_long_a_conversation(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"{'x' * 300}\nWhat?\n"
    said = "the conversation has 318 tokens and small reads 200; begin another one with /new\n"
    result = chat(monkeypatch, lines, "small", *TOKENS)
    assert (result.code, result.err) == (2, f"llm-pruner: {said}")
    live = talk(monkeypatch, lines, "small", *TOKENS)
    assert (live.code, live.err) == (0, f"llm-pruner: warning: {said}")
    assert "12 tokens" in live.out
