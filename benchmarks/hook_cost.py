"""What the entry point of the package costs a program that never uses it.

    python benchmarks/hook_cost.py [--runs 10]

PyTorch runs it when it is imported, unless ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``. In fresh processes,
with and without in turn: processor seconds of ``import torch``, and then of ``import
transformers.modeling_utils``, which has the tables that the entry point adds to. And by itself:
PyTorch's look for entry points, which it takes with and without this package, and ours. Writes the
medians to benchmarks/results/hook_cost.json. The package has to be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from commands import keep
from machine import here

RESULTS = Path(__file__).parent / "results"

IMPORTS = """
from time import process_time as now
start = now()
import torch
middle = now()
import transformers.modeling_utils
print(middle - start, now() - middle)
"""

BY_ITSELF = """
from time import process_time as now
import torch
start = now()
from importlib.metadata import entry_points
(found,) = [one for one in entry_points(group="torch.backends") if one.name == "llm_pruner"]
middle = now()
found.load()()
print(middle - start, now() - middle)
"""


def seconds(code: str, autoload: bool) -> list[float]:
    """Return what a fresh process prints."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload))}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(number) for number in ran.stdout.split()]


def main() -> None:
    """Run the processes, print and write the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    seconds(IMPORTS, autoload=True)  # everything is in the system's cache afterwards
    found = defaultdict(list)
    for _ in range(runs):
        for word, autoload in (("with", True), ("without", False)):
            torch, transformers = seconds(IMPORTS, autoload)
            found[f"import torch, {word}"].append(torch)
            found[f"import transformers.modeling_utils, {word}"].append(transformers)
        look, ours = seconds(BY_ITSELF, autoload=False)
        found["PyTorch looks for entry points"].append(look)
        found["entry point of this package"].append(ours)
    result = {
        "runs": runs,
        "median_seconds": {name: median(values) for name, values in sorted(found.items())},
        **here(),
    }
    print(json.dumps(result, indent=1))
    keep(RESULTS / "hook_cost.json", result)


if __name__ == "__main__":
    main()
