"""Prunes tiny models that the project does not know and compares each with an independent oracle.

    python -m venv venv-unseen
    venv-unseen/bin/pip install -r benchmarks/unseen/requirements.txt
    venv-unseen/bin/pip install --no-deps -r benchmarks/unseen/packages.txt
    OMP_NUM_THREADS=1 PYTHONPATH=src venv-unseen/bin/python benchmarks/unseen.py

(The packages' own pins contradict each other, hence --no-deps.) Random models from packages that
``transformers`` knows nothing of, and small modules of our own, lose a third of the units of each
structure, one kind at a time and all together. What is left must compute what the dense model with
those positions zeroed computes (``unseen/oracle.py``), in float64: prefills of several lengths,
padding, greedy generation, loss, gradients, train mode. ``--package``, ``--model`` and
``--structure`` choose; a run that was interrupted goes on where it was. Writes
benchmarks/results/unseen.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests/support")]

import torch  # noqa: E402

import llm_pruner  # noqa: E402
from machine import commits  # noqa: E402
from unseen.spec import SPECS  # noqa: E402

TIME_LIMIT = 120
"""Seconds for one model."""

BAD = ("WRONG", "crashed", "refused", "no verdict")


def main() -> int:
    """Run the sweep; returns 1 if anything is wrong or crashed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--package", action="append", help="models of this package; repeatable")
    parser.add_argument("--model", action="append", help="this model; repeatable")
    parser.add_argument("--structure", help="this kind only, or all, or plan")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "unseen.json")
    parser.add_argument("--again", action="store_true", help="forget what is there of these models")
    parser.add_argument("--list", action="store_true", help="name the models and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import unseen.foreign
    import unseen.own  # noqa: F401

    if options.one:
        from unseen.examine import examine

        print("\n" + json.dumps(examine(SPECS[options.one], options.structure)), flush=True)
        return 0
    unknown = set(options.model or ()) - set(SPECS)
    if unknown:
        parser.error(f"no such models: {', '.join(sorted(unknown))}; see --list")
    specs = [
        spec
        for spec in SPECS.values()
        if spec.package in (options.package or (spec.package,))
        and spec.name in (options.model or (spec.name,))
    ]
    if options.list:
        print("\n".join(f"{spec.package:40s} {spec.name}" for spec in specs))
        return 0
    missing = sorted({s.package for s in specs if s.package != "own" and not _version(s.package)})
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    specs = [spec for spec in specs if spec.package not in missing]
    journal = options.out.with_suffix(".jsonl")
    commit, source = commits()
    rows = _read(journal, source)
    if options.again:
        rows = {name: row for name, row in rows.items() if name not in {s.name for s in specs}}
    waiting = [spec.name for spec in specs if spec.name not in rows]
    for name, row in _run(waiting, options.jobs, options.structure):
        rows[name] = row
        if options.structure is None:
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"source": source, "row": row}) + "\n")
        _show(row)
    chosen = [rows[spec.name] for spec in specs if spec.name in rows]
    if options.structure is None:
        _write(options.out, (commit, source), [row for name, row in rows.items() if name in SPECS])
    print(table(chosen))
    counts = Counter(s["verdict"] for row in chosen for s in row["structures"])
    return int(bool(counts["WRONG"] or counts["crashed"]))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(journal: Path, source: str) -> dict[str, Any]:
    """Return what an earlier run on the same source left."""
    rows: dict[str, Any] = {}
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["source"] == source:
                rows[entry["row"]["model"]] = entry["row"]
    return rows


def _run(names: list[str], jobs: int, structure: str | None) -> Any:
    """Yield (name, result), each model in a process of its own."""
    running: dict[str, tuple[subprocess.Popen[str], float]] = {}
    waiting = list(names)
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            command = [sys.executable, __file__, "--one", name]
            command += ["--structure", structure] if structure else []
            running[name] = (
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                ),
                time.monotonic(),
            )
        for name, (process, started) in list(running.items()):
            try:
                output, _ = process.communicate(timeout=0.2)
            except subprocess.TimeoutExpired:
                if time.monotonic() - started < TIME_LIMIT:
                    continue
                process.kill()
                output, _ = process.communicate()
            del running[name]
            lines = output.strip().splitlines()
            try:
                row = json.loads(lines[-1])
            except (IndexError, ValueError):
                why = (
                    f"more than {TIME_LIMIT} s"
                    if process.returncode == -9
                    else f"the process ended with {process.returncode}"
                )
                row = {
                    "model": name,
                    "package": SPECS[name].package,
                    "structures": [],
                    "error": why,
                }
            yield name, row


def _show(row: dict[str, Any]) -> None:
    found = " ".join(f"{s['structure']}:{s['verdict']}" for s in row["structures"])
    print(
        f"{row['package'][:24]:24s} {row['model'][:40]:40s} {row.get('error', '')[:200]}{found}",
        flush=True,
    )


def _write(out: Path, commit: tuple[str, str], rows: list[dict[str, Any]]) -> None:
    packages = sorted({row["package"] for row in rows} - {"own"})
    content = {
        "commit": commit[0],
        "last_commit_of_the_source": commit[1],
        "llm_pruner": llm_pruner.__version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "packages": {package: _version(package) for package in packages},
        "verdicts": dict(Counter(s["verdict"] for row in rows for s in row["structures"])),
        "models": sorted(rows, key=lambda row: (row["package"], row["model"])),
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the verdicts by package, and every case that is not right or frozen."""
    verdicts = ("right", "frozen", *BAD, "absent")
    lines = [f"{'package':40s} models " + " ".join(f"{v:>10s}" for v in verdicts) + "      share"]
    by_package: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_package[row["package"]].append(row)
    for package, members in [*sorted(by_package.items()), ("together", rows)]:
        count = Counter(s["verdict"] for row in members for s in row["structures"])
        cases = sum(count.values()) - count["absent"]
        share = f"{count['right'] / cases:10.0%}" if cases else " " * 10
        cells = " ".join(f"{count[v]:10d}" for v in verdicts)
        lines.append(f"{package:40s} {len(members):6d} {cells} {share}")
    controls = [s["control"] for row in rows for s in row["structures"] if "control" in s]
    noticed = controls.count("noticed")
    lines.append(f"control: {noticed} of {len(controls)} shifts of one member in a group noticed")
    for row in rows:
        if "error" in row:
            lines.append(f"cannot run: {row['package']}, {row['model']}: {row['error'][:200]}")
        for s in row["structures"]:
            if s["verdict"] in BAD:
                what = s.get("reason") or f"{s['difference']:.1e}, masked twin {s.get('twin')}"
                case = f"{row['package']}, {row['model']}, {s['structure']}"
                lines.append(f"{s['verdict']}: {case}: {what[:300]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
