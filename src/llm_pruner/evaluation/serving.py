"""How fast a server answers: it runs in a process of its own, and is asked as anybody would ask.

Requests go to ``/v1/completions`` with streaming, which vLLM and llama.cpp have alike. What a
server reads of one prompt is never in another one, so nothing that it keeps answers the next.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from llm_pruner.errors import LLMPrunerError, UserError
from llm_pruner.evaluation.speed import Speed, in_turns, speed_of
from llm_pruner.files.disk import expanded
from llm_pruner.runtime import tied
from llm_pruner.runtime.progress import track

HOST = "127.0.0.1"
NAME = "model"
"""What a server is asked for."""

_JSON = {"Content-Type": "application/json"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""Environment in which a server fetches and sends nothing."""

_START, _ANSWER, _END = 3600.0, 600.0, 20.0
"""Seconds in which a server has to start, to go on with an answer, and to end."""

_LOOK = 0.2
"""Seconds between questions whether it has started."""

_LAST_LINES, _LAST_LETTERS = 3, 400
"""Of a log, in an error."""


@dataclass(frozen=True)
class Wanted:
    """What a server is started for.

    Attributes:
        tokens: of a text, prompt and answer.
        texts: at once, at most.
        cache_bytes_per_token: of the largest of the models.
        trust_remote_code: whether code of a folder may run.
        more: options of its own that the user gave.
    """

    port: int
    tokens: int
    texts: int
    dtype: str
    cache_bytes_per_token: int
    servers: int
    trust_remote_code: bool
    more: tuple[str, ...]


@dataclass(frozen=True)
class Server:
    """A server that has started."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    seconds: float = 0.0

    def peak_bytes(self) -> int:
        """Return the most memory that its processes held, or hold now, added up; no GPU's."""
        with suppress(psutil.Error):
            own = psutil.Process(self.process.pid).children(recursive=True)
            return sum(map(_peak_of, own))
        return 0

    def ask(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """Return when the tokens of an answer came; LLMPrunerError if they are not as asked."""
        asked = {
            "model": NAME,
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with closing(HTTPConnection(HOST, self.port, timeout=_ANSWER)) as connection:
                sent = time.perf_counter()
                connection.request("POST", "/v1/completions", json.dumps(asked), _JSON)
                response = connection.getresponse()
                if response.status != 200:
                    said = response.read(_LAST_LETTERS).decode(errors="replace")
                    raise LLMPrunerError(
                        f"{self.name} refused a request ({response.status}: {_one_line(said)})"
                    )
                # Read as it comes and understood later, so that this takes no time from the server.
                lines = [(time.perf_counter(), line) for line in response]
        except (OSError, HTTPException) as error:
            raise LLMPrunerError(
                f"{self.name} gave no whole answer ({type(error).__name__}); its last lines: "
                f"{last_lines(self.log)}"
            ) from error
        return answer_of(self.name, sent, lines, new_tokens)


@dataclass(frozen=True)
class Answer:
    """When an answer came, in seconds of one clock.

    Attributes:
        sent: when it was asked for.
        pieces: when its parts came; a part is a token, or a few.
        tokens: in all parts.
    """

    sent: float
    pieces: tuple[float, ...]
    tokens: int

    def tokens_after(self, moment: float) -> float:
        """Return how many tokens after the first one came after a moment."""
        later = [piece > moment for piece in self.pieces[1:]]
        return (self.tokens - 1) * sum(later) / max(1, len(later))


def answer_of(
    name: str, sent: float, lines: Sequence[tuple[float, bytes]], new_tokens: int
) -> Answer:
    """Return an answer from server-sent events, lines with their times, or LLMPrunerError."""
    pieces: list[float] = []
    tokens = 0
    try:
        for moment, line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise LLMPrunerError(f"{name} ended an answer: {_one_line(str(event['error']))}")
            # The last event of some servers says why it ended, and holds no text.
            if any(one["text"] or not one["finish_reason"] for one in event["choices"]):
                pieces.append(moment)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (ValueError, KeyError, TypeError) as error:
        raise LLMPrunerError(
            f"{name} answers in no form that is known here ({type(error).__name__}: {error})"
        ) from error
    if tokens != new_tokens:
        raise LLMPrunerError(f"{name} wrote {tokens} tokens, and {new_tokens} were asked for")
    if len(pieces) < 2:
        raise LLMPrunerError(f"{name} wrote {tokens} tokens at once, so none can be timed")
    return Answer(sent, tuple(pieces), tokens)


@contextmanager
def serving(name: str, command: Sequence[str | Path], port: int, log: Path) -> Iterator[Server]:
    """Start a server that listens on `HOST`, and yield it once its ``/health`` answers.

    It ends with the block or with this process. Raises LLMPrunerError if it ended, with its last
    lines from ``log``, or does not answer.
    """
    begin = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-I", tied.__file__, str(os.getpid()), *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | _OFFLINE,
            start_new_session=True,
        )
    try:
        server = Server(name, port, process, log)
        for _ in track(_until_it_answers(server, begin), f"starting {name}"):
            pass
        yield Server(name, port, process, log, time.perf_counter() - begin)
    finally:
        process.terminate()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until_it_answers(server: Server, begin: float) -> Iterator[None]:
    while not _answers(server.port):
        if server.process.poll() is not None:
            raise LLMPrunerError(
                f"{server.name} did not start; its last lines: {last_lines(server.log)}"
            )
        if time.perf_counter() - begin > _START:
            raise LLMPrunerError(f"{server.name} did not start within {_START / 60:.0f} minutes")
        time.sleep(_LOOK)
        yield


def _answers(port: int) -> bool:
    try:
        with closing(HTTPConnection(HOST, port, timeout=_END)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False


def program_of(name: str, python: Path | None) -> str | None:
    """Return the path of a program on the PATH or beside ``python``, by default ours, or None.

    Raises UserError if there is no such Python.
    """
    if python is not None and shutil.which(expanded(python)) is None:
        raise UserError(
            f"--server-python {python} is no program; name the Python of an environment, such as "
            "serve/bin/python"
        )
    folder = expanded(python or sys.executable).absolute().parent
    return (shutil.which(name) if python is None else None) or shutil.which(name, path=str(folder))


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


def last_lines(log: Path) -> str:
    """Return the last lines of a log in one line, those that tell of an error if there are any."""
    lines = [_one_line(line) for line in log.read_text(errors="replace").splitlines()]
    lines = list(dict.fromkeys(filter(None, lines)))
    wrong = [line for line in lines if "error" in line.lower()]
    said = " / ".join((wrong or lines)[-_LAST_LINES:]) or "nothing"
    return said if len(said) <= _LAST_LETTERS else f"...{said[-_LAST_LETTERS:]}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _peak_of(process: psutil.Process) -> int:
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def measure_servers(
    servers: Sequence[Server],
    vocabulary: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    batch_size: int,
) -> list[Speed]:
    """Time servers in turns on the same requests, ``batch_size`` of them at once.

    Of a round, the prefill lasts until the last of the first tokens, and decoding as long as all
    new tokens would take at the rate at which tokens come from then on.

    Args:
        vocabulary: prompts are of random ids below it, others in each round.

    Raises:
        LLMPrunerError: a server gives no answer.
    """
    text = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size}

    def once(server: Server, number: int) -> tuple[float, float, float]:
        chance = np.random.default_rng((prompt_tokens, batch_size, number))
        prompts = chance.integers(vocabulary, size=(batch_size, prompt_tokens)).tolist()
        return round_of(_at_once(server, prompts, new_tokens), new_tokens)

    runs = [partial(once, server) for server in servers]
    words = f"asking {servers[0].name}, {batch_size} at once"
    return [speed_of(times, repeats=repeats, **text) for times in in_turns(runs, repeats, words)]


def _at_once(server: Server, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
    pool = ThreadPoolExecutor(len(prompts))
    try:
        return [*pool.map(lambda prompt: server.ask(prompt, new_tokens), prompts)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # those that wait end with the server


def round_of(answers: Sequence[Answer], new_tokens: int) -> tuple[float, float, float]:
    """Return the seconds of prefill and decoding, and the median of those to a first token."""
    begin = min(one.sent for one in answers)
    middle = max(one.pieces[0] for one in answers)
    end = max(one.pieces[-1] for one in answers)
    tokens = sum(one.tokens_after(middle) for one in answers)
    decode = (end - middle) * len(answers) * new_tokens / tokens
    return middle - begin, decode, median(one.pieces[0] - one.sent for one in answers)
