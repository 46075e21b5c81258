"""What a model loses by each way of making it smaller, by how far it is from the dense model.

    python benchmarks/yardstick.py MODEL ROWS.yaml --text FILE [--text FILE] --out FILE

ROWS.yaml maps the name of a row to the commands that make its folder, one after the other, each a
list of arguments of ``llm-pruner`` without model and ``--out``: ``[prune, --ratio, 0.2]``, then
such as ``[recover, --data, FILE]``. A command reads the folder of the one before, the first one
MODEL; ``MODEL`` among the arguments stands for the dense model and ``PARAMS`` for what ``--params``
says. No command: the dense model. ``[folder, FOLDER]`` is a model that is there, made otherwise.

``[peer, PACKAGE, FILE, PARAMS]`` is pruning by another package of the field (``peer_pruners.py``
says how each is used), which is installed with torch and transformers in an environment of its own,
and FILE its calibration text:

    python -m venv peers && peers/bin/pip install torch transformers optipfair torch-pruning
    git clone https://github.com/horseee/LLM-Pruner original
    python benchmarks/yardstick.py ... --peers peers/bin/python --original original

FLAP, whose code needs transformers 4.28 and has no grouped heads, is ``reference/flap.py``.

Each row is measured by ``evaluate --against MODEL`` on the first ``--max-tokens`` of each text,
which no row may be fitted to: KL to the dense model, share of changed first choices, perplexity as
a multiple of the dense model's, with standard errors; beside it parameters and seconds. Where
``vocab`` took tokens, all this is of those that stayed, and bits per byte say what that costs.
``--seeds`` makes each row that many times. OUT is written after each row, and goes on from there.
With ``--work`` the folders stay, and what two rows begin with alike is made once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from math import log
from pathlib import Path
from typing import Any

import yaml

from commands import found_by, keep, llm_pruner, results_in, stamp
from llm_pruner.commands.workdir import content
from llm_pruner.data.text import load_evaluation_text
from llm_pruner.models.load import load_tokenizer
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.words import parse_count
from machine import here

HERE = Path(__file__).parent


def seconds_of_children() -> tuple[float, float]:
    """Return the time, and the processor's time that the processes that ended took."""
    times = os.times()
    return times.elapsed, times.children_user + times.children_system


def peer(options: argparse.Namespace, model: str, out: Path, arguments: list[Any]) -> None:
    """Prune a model by another package, in its environment."""
    package, text, params = arguments
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    script = (options.peers, HERE / "peer_pruners.py", package, model, text, out)
    arguments = [*script, parse_count(params), "--source", options.original]
    subprocess.run([*map(str, arguments)], env=environment, check=True)


def made(
    options: argparse.Namespace, commands: list[list[Any]], seed: int, work: Path
) -> tuple[str, list[list[float | None]]]:
    """Carry out the commands of a row.

    Return the folder of the last one, and of each command its seconds and those of the processor,
    which tell more where something else ran beside it.
    """
    last, seconds = options.model, []
    for number, (name, *arguments) in enumerate(commands):
        if name == "folder":
            [last] = arguments
            continue
        words = [word for command in commands[: number + 1] for word in command]
        out = work / stamp(options.model, seed, *words)
        took = out.with_suffix(".seconds")
        if not took.exists():
            said = [options.model if one == "MODEL" else one for one in arguments]
            begin = seconds_of_children()
            if name == "peer":
                peer(options, last, out, said)
            else:
                goes_on = ["--resume"] if out.with_suffix(".recovering").exists() else []
                seeded = [] if name == "vocab" else ["--set", f"seed={seed}"]
                llm_pruner(name, last, "--out", out, *seeded, "--overwrite", *goes_on, *said)
            if (said_of := Path(last, "peer.json")).exists():
                shutil.copy(said_of, out)  # how many parameters are no zeros, also once trained
            ends = zip(seconds_of_children(), begin, strict=True)
            took.write_text(json.dumps([round(end - start, 1) for end, start in ends]))
        spent = json.loads(took.read_text())
        seconds.append(spent if isinstance(spent, list) else [spent, None])  # of earlier versions
        last = str(out)
    return last, seconds


def bytes_of_token(folder: str, text: str, options: argparse.Namespace) -> float:
    """Return how many bytes of a text a token that ``evaluate`` reads stands for, on average."""
    tokenizer = load_tokenizer(ModelSettings(model=folder))
    told = load_evaluation_text(text, PerplexitySettings()).text
    encoded = tokenizer(told, add_special_tokens=False, verbose=False)["input_ids"]
    ids = encoded[: options.max_tokens]
    return len(tokenizer.decode(ids).encode()) / len(ids)


def measured(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is left of the dense model in a folder."""
    texts = [word for text in options.text for word in ("--perplexity", text)]
    found = found_by(
        *("evaluate", folder, *texts, "--against", options.model, "--dtype", options.dtype),
        *("--set", f"max_tokens={options.max_tokens}", "--set", f"seq_len={options.window}"),
    )
    rows = {}
    for text, one in zip(options.text, found["perplexity"], strict=True):
        far = one["divergence"]
        rows[Path(one["corpus"]).stem] = {
            "kl": [round(far["kl"], 4), round(far["kl_stderr"], 4)],
            "changed": [round(far["changed"], 4), round(far["changed_stderr"], 4)],
            "perplexity": [round(one["perplexity"], 3), round(far["perplexity"], 3)],
            "ratio": round(one["perplexity"] / far["perplexity"], 4),
            "bits_per_byte": round(one["nll"] / log(2) / bytes_of_token(folder, text, options), 4),
        }
    said = Path(folder, "peer.json")  # where a peer's zeros are no parameters
    parameters = json.loads(said.read_text()) if said.exists() else found
    return {"parameters": parameters["parameters"], "texts": rows}


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows", type=Path, help="YAML: name -> list of commands")
    parser.add_argument("--text", action="append", required=True, help="to judge by; nothing else")
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="of the measurement")
    parser.add_argument("--params", default="113.27M", help="what PARAMS stands for")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--peers", help="python that has the other packages")
    parser.add_argument("--original", help="checkout of LLM-Pruner")
    parser.add_argument("--work", type=Path, help="folder that keeps what is made; must be there")
    parser.add_argument("--only", help="names of rows, comma-separated")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = yaml.safe_load(options.rows.read_text(encoding="utf-8"))
    settings = {
        "model": Path(options.model).name,
        "texts": [Path(text).name for text in options.text],
        "contents": [content(text) for text in options.text],
        "max_tokens": options.max_tokens,
        "window": options.window,
        "dtype": options.dtype,
    }
    results = results_in(options.out, settings, parser, rows=[])
    wanted = options.only.split(",") if options.only else [*asked]
    for name in wanted:
        commands = [
            [options.params if word == "PARAMS" else word for word in command]
            for command in asked[name]
        ]
        sized = {} if commands == asked[name] else {"params": options.params}
        shown = [[Path(str(word)).name for word in command] for command in commands]
        for seed in range(options.seeds):
            key: dict[str, Any] = {"name": name, "seed": seed, **sized}
            if any(key.items() <= row.items() for row in results["rows"]):
                continue
            with tempfile.TemporaryDirectory() as folder:
                work = options.work or Path(folder)
                last, seconds = made(options, commands, seed, work)
                found = measured(last, options)
            row = {
                **key,
                "commands": [" ".join(words) for words in shown],
                "seconds": [wall for wall, _ in seconds],
                "processor_seconds": [processor for _, processor in seconds],
                **found,
                **here(),
            }
            results["rows"].append(row)
            keep(options.out, results)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
