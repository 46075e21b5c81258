"""What three commands did to a user's machine once, and do now.

    python benchmarks/critical.py [--out FILE.json]

Each is run on a tiny random model in a folder of its own: replacing a folder that holds the input,
loading a checkpoint whose config.json names attributes of classes, and writing results to a device.
Writes benchmarks/results/critical.json; with PYTHONPATH set to an older source, what that does.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import keep

HERE = Path(__file__).parent
# What makes the models is of today; the commands are of the source that PYTHONPATH names.
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "tests/support")]
from command import save_tiny  # noqa: E402

ATTACK = {"quant_method": "llm_pruner", "format_version": 1}
VALUES = {
    "__class__.forward": 3,
    "save_pretrained.__func__.__defaults__": [True, None, True, None, "a-token"],
    "from_pretrained.__func__.__kwdefaults__": {"weights_only": False},
}
LOADS = """
import sys, llm_pruner
from transformers import AutoModelForCausalLM, LlamaForCausalLM
def state():
    save, load = LlamaForCausalLM.save_pretrained, LlamaForCausalLM.from_pretrained.__func__
    return (LlamaForCausalLM.forward, save.__defaults__, str(load.__kwdefaults__))
before = state()
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except BaseException as error:
    print(type(error).__name__, " ".join(str(error).split()))
print("class changed:", state() != before)
"""


def said(*arguments: object, cwd: Path) -> dict[str, Any]:
    """Run Python in a process of its own; return its code and the last lines that it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    lines = (done.stdout or done.stderr).strip().splitlines()
    return {"code": done.returncode, "said": lines[-2:]}


def replaces_input(folder: Path) -> dict[str, Any]:
    """``prune zoo/llama --out zoo --overwrite``, with a file of the user beside the model."""
    save_tiny(folder / "zoo" / "llama")
    (folder / "zoo" / "notes.txt").write_text("of the user")
    options = ("--ratio", "0.2", "--criterion", "random", "--overwrite")
    options = (*options, "--compensation", "none")
    done = said("-m", "llm_pruner", "prune", "zoo/llama", "--out", "zoo", *options, cwd=folder)
    kept = (folder / "zoo" / "llama" / "config.json").is_file()
    return {**done, "input kept": kept, "notes kept": (folder / "zoo" / "notes.txt").is_file()}


def runs_config(folder: Path) -> dict[str, Any]:
    """``from_pretrained`` of a checkpoint whose reshaping recipe sets attributes of classes."""
    save_tiny(folder / "model")
    file = folder / "model" / "config.json"
    config = json.loads(file.read_text())
    found = {}
    for name, value in VALUES.items():
        attributes = {"": {name: value}}
        file.write_text(
            json.dumps({**config, "quantization_config": {**ATTACK, "attributes": attributes}})
        )
        found[name] = said("-c", LOADS, "model", cwd=folder)
    return found


def replaces_device(folder: Path) -> dict[str, Any]:
    """``inspect --json`` into a device that is one like /dev/null; needs root to make it."""
    save_tiny(folder / "model")
    device = folder / "null"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    done = said("-m", "llm_pruner", "inspect", "model", "--json", "null", cwd=folder)
    return {**done, "said": done["said"][-1:], "still a device": device.is_char_device()}


def main() -> None:
    """Run all three and write what they did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "critical.json")
    options = parser.parse_args()
    found = {}
    for case in (replaces_input, runs_config, replaces_device):
        with tempfile.TemporaryDirectory() as folder:
            found[case.__name__] = case(Path(folder))
            text = json.dumps(found[case.__name__], indent=1).replace(f"{folder}/", "")
            found[case.__name__] = json.loads(text)
            print(case.__name__, text)
    keep(options.out, found)


if __name__ == "__main__":
    main()
