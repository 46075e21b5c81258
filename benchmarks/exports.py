"""Pruned folders through torch.export, torch.compile, ONNX and OpenVINO: are the logits the same?

    python benchmarks/exports.py FOLDER ... [--ways torch.export,torch.compile]

Each folder is loaded by transformers as anybody would. What is made of it is run on texts of two
lengths, the second one not seen when it was made, without a cache; the difference is the largest of
any logit from the model that ran as it is, in float32 on a CPU. ONNX needs onnxscript and
onnxruntime, OpenVINO openvino; each is left out where its packages are not. Writes
benchmarks/results/exports.json. What is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from commands import keep, results_in
from machine import machine

RESULTS = Path(__file__).parent / "results"
LENGTHS = (16, 41)

Run = Callable[[torch.Tensor], torch.Tensor]


class Logits(nn.Module):
    """A model as a function of token ids, shape (1, length), that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def main() -> None:
    """Make, compare and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "exports.json")
    parser.add_argument(
        "--ways", help="names parted by commas; default: all whose packages are here"
    )
    options = parser.parse_args()
    here = {name for name, (_, needed) in WAYS.items() if all(map(find_spec, needed))}
    asked = options.ways.split(",") if options.ways else [name for name in WAYS if name in here]
    results = results_in(options.out, {"lengths": LENGTHS}, parser, rows={})
    for folder in options.folders:
        row = results["rows"].setdefault(folder.name, {})
        missing = [name for name in asked if name not in row]
        if not missing:
            continue
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        )
        network = Logits(model.eval())
        for name in missing:
            way, needed = WAYS[name]
            versions = {one: version(one) for one in ("torch", "transformers", *needed)}
            row[name] = {**compared(network, way), "versions": versions, "machine": machine()}
            keep(options.out, results)
            print(folder.name, name, json.dumps(row[name]), flush=True)


def texts(vocabulary: int) -> list[torch.Tensor]:
    """Return token ids of each length."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, length), generator=generator) for length in LENGTHS]


@torch.no_grad()
def compared(network: Logits, way: Callable[[Logits, torch.Tensor], Run]) -> dict[str, Any]:
    """Return how far the logits are from the model's, and the seconds to make and first run it."""
    given = texts(network.model.config.vocab_size)
    wanted = [network(text) for text in given]
    start = time.perf_counter()
    try:
        run = way(network, given[0])
        found = [run(text) for text in given]
    except Exception as error:  # exporters raise anything
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    seconds = time.perf_counter() - start
    pairs = list(zip(found, wanted, strict=True))
    return {
        "difference": max(float((one - other).abs().max()) for one, other in pairs),
        "same_choices": all(
            bool((one.argmax(-1) == other.argmax(-1)).all()) for one, other in pairs
        ),
        "largest_logit": max(float(other.abs().max()) for other in wanted),
        "seconds": round(seconds, 1),
    }


def exported(network: Logits, text: torch.Tensor) -> Run:
    """Export a model for texts of any length."""
    run: Run = _program(network, text).module()
    return run


def _program(network: Logits, text: torch.Tensor) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=2, max=2048)
    return torch.export.export(network, (text,), dynamic_shapes={"input_ids": {1: length}})


def compiled(network: Logits, _: torch.Tensor) -> Run:
    """Compile a model for texts of any length."""
    run: Run = torch.compile(network, dynamic=True)
    return run


def in_onnx(network: Logits, text: torch.Tensor) -> Run:
    """Write a model as ONNX; return what onnxruntime makes of it."""
    from onnxruntime import InferenceSession

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        torch.onnx.export(_program(network, text), dynamo=True, verbose=False).save(file)
        session = InferenceSession(file)

    def run(ids: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"input_ids": ids.numpy()})
        return torch.from_numpy(logits)

    return run


def in_openvino(network: Logits, text: torch.Tensor) -> Run:
    """Return what OpenVINO makes of an exported model."""
    import openvino

    model = openvino.convert_model(_program(network, text))
    # By default it computes in bfloat16 where the processor has it.
    served = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda ids: torch.from_numpy(served(ids.numpy())[0])


WAYS: dict[str, tuple[Callable[[Logits, torch.Tensor], Run], tuple[str, ...]]] = {
    "torch.export": (exported, ()),
    "torch.compile": (compiled, ()),
    "torch.onnx": (in_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "OpenVINO": (in_openvino, ("openvino",)),
}
"""Way -> what makes a function of a model, and the packages that it needs."""


if __name__ == "__main__":
    main()
