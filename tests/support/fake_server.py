"""Plays vLLM's or llama.cpp's server: a process that streams a fixed answer to every request.

It writes its arguments, its process id and that of a process that it starts to ``started.jsonl``
beside the program, and each request to ``asked.jsonl``. ``fake_server(folder, name)`` makes the
program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[0]).parent


def fake_server(folder: Path, name: str, options: dict[str, Any] | None = None) -> Path:
    """Write a program to a folder, and the Python beside which it is looked for; return that.

    Args:
        options: ``fails``: it prints these lines and ends; ``short``: tokens that an answer lacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).read_text(encoding="utf-8")
    program = folder / name
    program.write_text(f"#!{sys.executable}\n{source}", encoding="utf-8")
    program.chmod(0o755)
    (folder / "options.json").write_text(json.dumps(options or {}))
    python = folder / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    return python


def noted(folder: Path, name: str) -> list[Any]:
    """Return what a fake server wrote down."""
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _note(name: str, what: object) -> None:
    with (FOLDER / f"{name}.jsonl").open("a") as out:
        out.write(json.dumps(what) + "\n")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    short = 0

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _note("asked", {"path": self.path, **asked})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        count = asked["max_tokens"] - self.short
        for number in range(count):
            time.sleep(0.001)  # or tokens arrive together, and a rate has no bounds
            last = number == count - 1
            choice = {"text": "x", "finish_reason": "length" if last else None}
            self._event({"choices": [choice], "usage": None})
        self._event({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: object) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


def main() -> None:
    """Serve until a signal comes, and leave the process that was started to others."""
    options = json.loads((FOLDER / "options.json").read_text())
    if "fails" in options:
        print(options["fails"])
        sys.exit(3)
    child = subprocess.Popen(["sleep", "600"])
    _note("started", {"arguments": sys.argv[1:], "processes": [os.getpid(), child.pid]})
    _Handler.short = options.get("short", 0)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), _Handler).serve_forever()


if __name__ == "__main__":
    main()
