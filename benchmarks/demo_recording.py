"""The demo as a picture of a terminal, docs/assets/demo.svg.

    python benchmarks/demo_recording.py              runs ``llm-pruner demo`` and records it
    python benchmarks/demo_recording.py --from FILE  draws what ``script`` or a pipe recorded

Lines that the demo writes over, such as progress bars, are shown as they were last.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

OUT = Path(__file__).parents[1] / "docs" / "assets" / "demo.svg"
WIDTH = 100


def recorded(command: list[str]) -> str:
    """Run a command in a terminal of its own; return what it wrote."""
    import pty

    written = io.BytesIO()

    def read(terminal: int) -> bytes:
        piece = os.read(terminal, 4096)
        written.write(piece)
        return piece

    os.environ.update(COLUMNS=str(WIDTH), LINES="40", TERM="xterm-256color")
    code = os.waitstatus_to_exitcode(pty.spawn(command, read))
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return written.getvalue().decode(errors="replace")


def last_written(text: str) -> str:
    """Return the lines as they stood at the end: without moves of the cursor, nor what they hid."""
    lines: list[str] = [""]
    at = 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r\n|\n|\r)", text):
        if part in ("\n", "\r\n"):
            at += 1
            lines.extend([""] * (at + 1 - len(lines)))
        elif part == "\r" or part == "\x1b[2K":
            lines[at] = ""
        elif match := re.fullmatch(r"\x1b\[(\d*)A", part):
            at = max(0, at - int(match[1] or 1))
        elif part.startswith("\x1b[") and not part.endswith("m"):
            continue
        else:
            lines[at] += part
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def svg(text: str, title: str) -> str:
    """Return a terminal with a text in it; no fonts are fetched."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text))
    drawn = console.export_svg(title=title, unique_id="demo")
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    return drawn.replace("Fira Code, monospace", "Menlo, Consolas, 'DejaVu Sans Mono', monospace")


def main() -> None:
    """Record the demo and draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, help="what was recorded before")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.source:
        text = options.source.read_text(encoding="utf-8")
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            text = recorded([sys.executable, "-m", "llm_pruner", "demo"])
    text = f"$ llm-pruner demo\n{last_written(text)}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(svg(text, "llm-pruner demo"), encoding="utf-8")


if __name__ == "__main__":
    main()
