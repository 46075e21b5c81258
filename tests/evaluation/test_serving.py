"""Servers that are started, asked and ended: when tokens came, what goes wrong, what is left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from fake_server import fake_server, noted
from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.evaluation.serving import (
    Answer,
    Server,
    answer_of,
    free_port,
    last_lines,
    measure_servers,
    program_of,
    round_of,
    serving,
)


def event(text: str | None, reason: str | None = None, tokens: int | None = None) -> bytes:
    choices = [] if text is None else [{"text": text, "finish_reason": reason}]
    usage = None if tokens is None else {"completion_tokens": tokens}
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n".encode()


# What a stream says.


def test_an_answer_as_vllm_streams_it() -> None:
    events = [event("a"), b"\n", event(""), event("c", "length"), event(None, tokens=3)]
    lines = [*zip((1.0, 1.5, 2.0, 4.0, 5.0), events, strict=True), (6.0, b"data: [DONE]\n")]
    found = answer_of("vllm", 0.5, lines, 3)
    assert found == Answer(sent=0.5, pieces=(1.0, 2.0, 4.0), tokens=3)


def test_an_answer_as_llama_cpp_streams_it() -> None:
    # Two tokens that are half a letter each come as one; the last event holds no text.
    events = [event("a"), event("\u00e9"), event("d"), event("", "length", tokens=4)]
    found = answer_of("llama.cpp", 0.0, [*zip((1.0, 3.0, 4.0, 9.0), events, strict=True)], 4)
    assert found.pieces == (1.0, 3.0, 4.0)
    assert found.tokens_after(2.5) == 3
    assert found.tokens_after(3.5) == 1.5


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([event("a"), event("b"), event(None, tokens=2)], "s wrote 2 tokens, and 3 were asked for"),
        ([event("abc"), event(None, tokens=3)], "s wrote 3 tokens at once, so none can be timed"),
        ([b'data: {"error": {"message": "no\\nroom"}}\n'], "s ended an answer: .*no.*room"),
        ([b'data: {"result": 1}\n'], r"s answers in no form that is known here \(KeyError"),
        ([b"<html>\n"], "s wrote 0 tokens, and 3 were asked for"),
    ],
)
def test_what_is_no_answer(lines: list[bytes], said: str) -> None:
    with pytest.raises(LLMPrunerError, match=said):
        answer_of("s", 0.0, [(float(at), line) for at, line in enumerate(lines)], 3)


def test_a_round_of_several_answers() -> None:
    first = Answer(sent=0.0, pieces=(1.0, 2.0, 3.0, 4.0, 5.0), tokens=5)
    second = Answer(sent=0.5, pieces=(3.0, 4.0, 5.0, 6.0, 7.0), tokens=5)
    prefill, decode, to_first = round_of([first, second], 5)
    assert prefill == 3.0
    # From 3 to 7 come two tokens of the first and four of the second: 10 take 4 * 10 / 6 seconds.
    assert decode == pytest.approx(4 * 10 / 6)
    assert to_first == (1.0 + 2.5) / 2


class Timed(Server):
    """Takes the same time for each token, and writes down what it is asked."""

    asked: ClassVar[list[tuple[str, list[int]]]] = []

    def ask(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        self.asked.append((self.name, list(prompt)))
        seconds = float(self.port)
        pieces = tuple(seconds * (2 + number) for number in range(new_tokens))
        return Answer(0.0, pieces, new_tokens)


def test_servers_take_turns_on_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timed, "asked", [])
    process = subprocess.Popen(["true"])
    process.wait()
    pair = [Timed(name, port, process, Path("log")) for name, port in (("fast", 1), ("slow", 3))]
    fast, slow = measure_servers(pair, 50, prompt_tokens=4, new_tokens=5, repeats=2, batch_size=2)
    assert fast.prefill_seconds == (2.0, 2.0)
    assert fast.decode_seconds == pytest.approx((5.0, 5.0))
    assert slow.decode_seconds == pytest.approx((15.0, 15.0))
    assert fast.prefill_tokens_per_second == 2 * 4 / 2.0
    assert slow.decode_tokens_per_second == pytest.approx(2 * 5 / 15.0)
    assert slow.first_token_seconds == 6.0
    assert (fast.batch_size, fast.repeats) == (2, 2)
    names = [name for name, _ in Timed.asked]
    assert names == ["fast"] * 2 + ["slow"] * 2 + ["fast"] * 2 + ["slow"] * 4 + ["fast"] * 2
    of = {name: sorted(p for one, p in Timed.asked if one == name) for name in ("fast", "slow")}
    assert of["fast"] == of["slow"]
    prompts = [tuple(prompt) for prompt in of["fast"]]
    assert len(set(prompts)) == 6  # none twice, so that nothing kept answers it
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)


# Processes.


def started(folder: Path, options: dict[str, object] | None = None) -> tuple[list[str], int]:
    """Return the command of a fake server in a folder, and its port."""
    port = free_port()
    fake_server(folder, "llama-server", options)
    return [str(folder / "llama-server"), "--port", str(port)], port


def gone(pids: Sequence[int]) -> bool:
    """Whether no such process runs any more; waits for it as long as a test may take."""

    def runs(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:  # it may end at any time
            return False

    for _ in range(600):
        if not any(runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_server_ends_with_its_block_and_takes_its_own_with_it(tmp_path: Path) -> None:
    command, port = started(tmp_path)
    with serving("llama.cpp", command, port, tmp_path / "log") as server:
        answer = server.ask([5, 6, 7], 4)
        (found,) = noted(tmp_path, "started")
        assert server.seconds > 0
        assert server.peak_bytes() > 2**20
        assert all(map(psutil.pid_exists, found["processes"]))
    assert len(answer.pieces) == answer.tokens == 4
    assert answer.sent < answer.pieces[0] <= answer.pieces[-1]
    (asked,) = noted(tmp_path, "asked")
    assert asked["path"] == "/v1/completions"
    assert asked["prompt"] == [5, 6, 7]
    assert (asked["stream"], asked["ignore_eos"], asked["temperature"]) == (True, True, 0)
    assert gone(found["processes"])
    with pytest.raises(LLMPrunerError, match=r"gave no whole answer \(ConnectionRefusedError\)"):
        server.ask([5], 2)


@pytest.mark.slow
def test_a_server_does_not_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    command, port = started(tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom llm_pruner.evaluation.serving import serving\n"
        f"with serving('s', {command!r}, {port}, Path({str(tmp_path / 'log')!r})):\n"
        "    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        (found,) = noted(tmp_path, "started")
        owner.kill()
    assert gone(found["processes"])


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    lines = "loading\nValueError: no room\nError: no room\ngoodbye"
    command, port = started(tmp_path, {"fails": lines})
    said = "s did not start; its last lines: ValueError: no room / Error: no room$"
    with (
        pytest.raises(LLMPrunerError, match=said),
        serving("s", command, port, tmp_path / "log"),
    ):
        pass
    command, port = started(tmp_path, {"short": 1})
    with (
        serving("s", command, port, tmp_path / "log") as server,
        pytest.raises(LLMPrunerError, match="s wrote 2 tokens, and 3 were asked for"),
    ):
        server.ask([1], 3)


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n\ntwo\n two\nthree  words\nfour")
    assert last_lines(log) == "two / three words / four"
    log.write_text("")
    assert last_lines(log) == "nothing"
    log.write_text("x" * 1000)
    assert last_lines(log) == "..." + "x" * 400


def test_where_a_program_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = fake_server(tmp_path / "bin", "some-server")
    monkeypatch.setenv("PATH", "/nowhere")
    assert program_of("some-server", None) is None
    assert program_of("some-server", python) == str(python.with_name("some-server"))
    monkeypatch.setenv("PATH", str(python.parent))
    assert program_of("some-server", None) == str(python.with_name("some-server"))
    assert program_of("some-server", fake_server(tmp_path / "other", "x")) is None
    with pytest.raises(UserError, match="no-python is no program; name the Python of an env"):
        program_of("some-server", tmp_path / "no-python")
