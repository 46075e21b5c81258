"""The table and the picture of the README, from one model and one set of texts.

    python benchmarks/readme_table.py --data DATA --work WORK --peers peers/bin/python

DATA has ``calib/`` (c4_sample.jsonl, wikipedia_sample.jsonl, books.jsonl), ``ppl/``
(wikitext2_raw_test.txt), ``recovery/`` (alpaca.jsonl, dolly.jsonl) and ``tasks/`` (boolq.jsonl
and so on). All rows prune on the same text: the first two thirds of C4 and four fifths of the
others. All are judged on the rest of C4 and of the books, and on WikiText-2 test.

``--peers`` is a Python with torch, transformers and optipfair; without it the rows of other
packages are left out. The results are written after each row, and the same command goes on from
there; the folder ``--work`` keeps the models. At the end the README's table is written anew, and
``readme_picture.py`` draws the picture. ``--only`` names rows, ``--render`` writes the table from
the file that is there, and ``--quick`` tries everything in minutes, for no figures.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from commands import keep, name_of, put, results_in, save_dense
from machine import commits, here
from yardstick import made, measured
from zero_shot_kept import evaluated, kept

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results" / "readme_table.json"
SHARES = (0.1, 0.2, 0.3, 0.4)
"""Shares of all parameters to remove: the picture has all, the table `TABLE`."""
TABLE = 0.2
NAMES = {
    "paper": "LLM-Pruner (`--preset paper`)",
    "optipfair": "optipfair",
    "FLAP": "FLAP",
    "balanced": "`balanced`, the default",
    "best": "`best`",
    "recovered": "`best`, an hour of `recover`",
}


def split_texts(data: Path, work: Path, quick: bool) -> tuple[list[Path], list[Path]]:
    """Write the texts that are pruned on, the last one of all in turns, and those that judge."""
    read, judge, documents = [], [], []
    for name, share in (("c4_sample", 2 / 3), ("wikipedia_sample", 0.8), ("books", 0.8)):
        lines = (data / "calib" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        cut = round(len(lines) * share)
        for kind, part, files in (("read", lines[:cut], read), ("judge", lines[cut:], judge)):
            files.append(_written(work / f"{name}-{kind}.jsonl", part[:20] if quick else part))
        documents.append("\n\n".join(json.loads(line)["text"] for line in lines[:cut]))
    step, longest = 4000, max(map(len, documents))
    turns = [text[at : at + step] for at in range(0, longest, step) for text in documents]
    lines = [json.dumps({"text": turn}) for turn in turns if turn]
    read.append(_written(work / "in-turns.jsonl", lines))
    return read, [judge[0], judge[2], data / "ppl" / "wikitext2_raw_test.txt"]


def _written(file: Path, lines: list[str]) -> Path:
    text = "\n".join(lines) + "\n"
    if not file.exists() or file.read_text(encoding="utf-8") != text:  # time and size name folders
        file.write_text(text, encoding="utf-8")
    return file


def rows(options: argparse.Namespace, read: list[Path], dense: int) -> dict[str, Any]:
    """Return name -> its share and the commands that make it, as ``yardstick.py`` reads them."""
    ours = ["--calibration", ",".join(map(str, read[:-1]))]
    minutes: list[Any] = ["--max-minutes", 60]
    few: list[Any] = []
    if options.quick:
        minutes = ["--trainer", "max_steps=2", "--set", "seq_len=64", "--samples", 20]
        few = ["--samples", 8, "--set", "seq_len=64", "--repair-minutes", 0]
    texts = [word for file in read[:-1] for word in ("--data", file)]
    for name in ("alpaca", "dolly"):
        texts += ["--data", options.data / "recovery" / f"{name}.jsonl"]
    made_by: dict[str, Any] = {"dense": (0.0, [])}
    for share in SHARES:
        size = str(round(dense * (1 - share)))
        for preset in ("paper", "balanced", "best"):
            words = [*("prune", "--params", size, "--preset", preset), *ours]
            words += [] if preset == "paper" else few
            made_by[f"{preset} {share}"] = (share, [words])
        for name, peer in (("optipfair", "optipfair-data"), ("FLAP", "flap")):
            if options.peers:
                made_by[f"{name} {share}"] = (share, [["peer", peer, read[-1], size]])
    best = made_by[f"best {TABLE}"][1]
    hour = ["recover", "--method", "blocks", "--teacher", "MODEL", *minutes, *texts]
    made_by[f"recovered {TABLE}"] = (TABLE, [*best, hour])
    return made_by


def table(results: dict[str, Any]) -> str:
    """Return the table of the README in Markdown, with the line that says what it is."""
    found = {row["name"]: row for row in results["rows"]}
    if "dense" not in found:
        return "*Not measured yet: `python benchmarks/readme_table.py`.*"
    lines = [
        "| model | parameters | KL | perplexity | tasks kept | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, name in {"dense": "dense", **{f"{k} {TABLE}": v for k, v in NAMES.items()}}.items():
        if key in found:
            lines.append(_line(name, found[key]))
    settings, dense = results["settings"], found["dense"]
    note = (
        f"{settings['model']}, {TABLE:.0%} of all parameters removed. KL: from dense, in "
        f"nats a token, mean over three unread texts; perplexity: WikiText-2; tasks: "
        f"accuracy above chance, {settings['limit']} items each. {dense['machine']}, "
        f"commit {dense['commit']}."
    )
    return "\n".join([*lines, "", note])


def _line(name: str, row: dict[str, Any]) -> str:
    kl, stderr = mean_kl(row)
    share = row.get("kept")
    cells = [
        name,
        f"{row['parameters'] / 1e6:.1f}M",
        f"{kl:.3f} ± {stderr:.3f}" if row["seconds"] else "0",
        f"{row['texts']['wikitext2_raw_test']['perplexity'][0]:.1f}",
        f"{share['value']:.0%} ± {share['stderr']:.0%}" if share else "",
        f"{sum(row['seconds']) / 60:.1f}" if row["seconds"] else "",
    ]
    return f"| {' | '.join(cells)} |"


def mean_kl(row: dict[str, Any]) -> tuple[float, float]:
    """Return the mean of the divergence over the texts, and its standard error."""
    each = [text["kl"] for text in row["texts"].values()]
    return sum(kl for kl, _ in each) / len(each), sum(err**2 for _, err in each) ** 0.5 / len(each)


def render(results: dict[str, Any], readme: Path = README) -> None:
    """Write the table between its marks in the README."""
    text = readme.read_text(encoding="utf-8")
    marks = r"(<!-- table: benchmarks/readme_table.py -->\n).*?(\n<!-- end of table -->)"
    text, times = re.subn(marks, lambda m: m[1] + table(results) + m[2], text, flags=re.DOTALL)
    if times != 1:
        raise SystemExit(f"{readme} has {times} places for the table, not one")
    readme.write_text(text, encoding="utf-8")


def parameters_in(folder: Path) -> int:
    """Return the number of parameters of a folder, a tied one once."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def main() -> None:
    """Make the rows that are missing and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with calib, ppl, recovery and tasks")
    parser.add_argument("--model", default="default")
    parser.add_argument("--peers", help="Python with torch, transformers and optipfair")
    parser.add_argument("--work", type=Path, default=Path("readme-work"))
    parser.add_argument("--only", help="names of rows such as 'best 0.2', comma-separated")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--limit", type=int, default=300, help="items of each task")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--render", action="store_true", help="write the table alone")
    parser.add_argument("--quick", action="store_true", help="few tokens, items and steps")
    options = parser.parse_args()
    if options.render:
        render(json.loads(options.out.read_text(encoding="utf-8")), options.readme)
        return
    if options.data is None:
        parser.error("--data is missing")
    if options.quick:
        options.max_tokens, options.limit = 256, 4
        options.out = options.work / "quick.json" if options.out == RESULTS else options.out
    options.work.mkdir(parents=True, exist_ok=True)
    read, judge = split_texts(options.data, options.work, options.quick)
    shown = name_of(options.model)
    if not (dense := options.work / "dense").exists():
        save_dense(options.model, dense)
    settings = {
        "model": shown,
        "read": [file.name for file in read],
        "judge": [file.name for file in judge],
        "max_tokens": options.max_tokens,
        "limit": options.limit,
    }
    # What the functions of yardstick.py read of its options.
    options.model, options.window, options.dtype = (
        str(dense),
        64 if options.quick else 512,
        "float32",
    )
    options.text, options.original = list(map(str, judge)), ""
    results = results_in(options.out, settings, parser, rows=[])
    made_by = rows(options, read, parameters_in(dense))
    wanted = options.only.split(",") if options.only else [*made_by]
    for name in sorted(wanted, key=lambda name: made_by[name][0] not in (0, TABLE)):
        if any(row["name"] == name for row in results["rows"]):
            continue
        share, commands = made_by[name]
        last, seconds = made(options, commands, 0, options.work)
        row = {"name": name, "share": share, "seconds": [wall for wall, _ in seconds]}
        row |= {**measured(last, options), **here(), "commit": commits()[0]}
        if share in (0, TABLE):
            row |= _tasks(last, options, results)
        put(results["rows"], row, "name")
        keep(options.out, results)
        print(json.dumps({key: row[key] for key in ("name", "seconds", "texts")}), flush=True)
    if options.out == RESULTS:
        render(results, options.readme)


def _tasks(folder: str, options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Return accuracies of the seven tasks, and what is kept of the dense model's."""
    found = evaluated(folder, options.data / "tasks", "bfloat16", options.limit)
    dense = next((row for row in results["rows"] if row["name"] == "dense"), found)
    share = kept(found, dense)["without boolq"]
    return {"tasks": found["tasks"], "kept": {**share, "flips": share.get("flips")}}


if __name__ == "__main__":
    main()
