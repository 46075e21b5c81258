"""What fewer tokens buy and cost: parameters, and bits per byte on text that was not read.

    python benchmarks/vocabulary.py --model default --sizes 40960,32768 --text FILE --text FILE

Runs ``llm-pruner vocab`` for each size and writes benchmarks/results/vocabulary.json, a row for
each model and size. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from commands import found_by, keep, results_in
from machine import here

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Make and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--sizes", required=True, help="comma-separated; used: all in the text")
    parser.add_argument("--out", type=Path, default=RESULTS / "vocabulary.json")
    options = parser.parse_args()
    settings = {"text": [Path(text).name for text in options.text]}
    results = results_in(options.out, settings, parser, rows={})
    rows = results["rows"].setdefault(Path(options.model).name, {})
    texts = [word for text in options.text for word in ("--text", text)]
    for size in options.sizes.split(","):
        if size in rows:
            continue
        asked = [] if size == "used" else ["--size", size]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "small"
            found = found_by("vocab", options.model, *texts, *asked, "--out", out)
        names = ("tokens", "parameters", "bits_per_byte", "tokens_per_kilobyte", "bytes")
        rows[size] = {**{name: found[name] for name in names}, **here()}
        keep(options.out, results)
        print(options.model, size, json.dumps(rows[size]), flush=True)


if __name__ == "__main__":
    main()
