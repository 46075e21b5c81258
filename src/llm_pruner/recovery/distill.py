"""What the dense model says about each learned token: a cache of its likeliest tokens on disk, so
that it runs once for all passes over a text; or all it says, of a text that is passed over once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from llm_pruner.data.sequences import TrainingSequence
from llm_pruner.errors import UserError
from llm_pruner.models.forward import embedding_rows
from llm_pruner.recovery.chunked_loss import logits_of, summed_loss
from llm_pruner.recovery.objective import (
    LossAndGradient,
    Objective,
    Targets,
    divergence_and_gradient_,
    mixed_loss_and_gradient_,
)
from llm_pruner.recovery.packing import Batch, can_pack, lay_out, micro_tokens, target_tokens
from llm_pruner.settings.recover import DistillationSettings

_FILES = ("ids.bin", "log_probabilities.bin", "done.bin")


class DirectTeacher:
    """A dense model that is asked at each step for KL(dense || model) over all tokens."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval().requires_grad_(False)

    def objective(self, batch: Batch) -> Objective:
        """Return the divergence on a batch."""
        with torch.no_grad():
            logits_of_dense = logits_of(self._model, batch)

        def objective(logits: torch.Tensor, span: slice) -> LossAndGradient:
            return divergence_and_gradient_(logits, logits_of_dense(span).to(logits.device))

        return objective

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Do nothing: each batch is asked about anew."""


class Teacher:
    """A dense model and a cache of its likeliest tokens.

    The cache is made of plain arrays, filled as samples are first used: ``ids.bin`` (int32) and
    ``log_probabilities.bin`` (float16) of shape (learned tokens, k), ``done.bin`` (one byte a
    sample). A training run always reads from it, also what was just written, so that a resumed run
    sees the same numbers.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequence[TrainingSequence],
        settings: DistillationSettings,
        folder: Path,
        *,
        identity: str,
        seq_len: int,
    ) -> None:
        """Open or make the cache in a subfolder of ``folder`` whose name tells everything in it.

        The samples are ``sequences``, at most ``seq_len`` long; ``identity`` is the model's
        fingerprint. Raises UserError if the teacher's vocabulary has fewer tokens than the data
        uses.
        """
        self._model, self._sequences, self.settings = model.eval(), sequences, settings
        model.requires_grad_(False)
        vocabulary = embedding_rows(model)
        largest = max(int(one.input_ids.max()) for one in sequences)
        if largest >= vocabulary:
            raise UserError(
                f"the data has token {largest} and the teacher {vocabulary} tokens; "
                "name the dense model that the student was cut from"
            )
        self._k = min(settings.teacher_top_k, vocabulary)
        self._seq_len, self._vocabulary = seq_len, vocabulary
        self._packed: bool | None = None
        targets = np.array([one.targets for one in sequences], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(targets)])
        key = hashlib.sha256(json.dumps([identity, self._k, settings.temperature]).encode())
        for one in sequences:
            key.update(one.input_ids.tobytes())
            key.update(one.learned.tobytes())
        self.folder = folder / key.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        shape = (int(self._first[-1]), self._k)
        if not all((self.folder / name).is_file() for name in _FILES):
            (self.folder / "done.bin").unlink(missing_ok=True)
        self._ids = _array(self.folder / "ids.bin", "int32", shape)
        self._values = _array(self.folder / "log_probabilities.bin", "float16", shape)
        self._done = _array(self.folder / "done.bin", "uint8", (len(sequences),))
        taught = settings.model_dump(include=set(DistillationSettings.model_fields))
        about = {"teacher": identity, "samples": len(sequences), **taught}
        (self.folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")

    def says(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids, int64, log probabilities, float32: (learned tokens, k)."""
        self.prepare([batch])
        rows = self._rows(batch)
        values = torch.from_numpy(self._values[rows]).float()
        return torch.from_numpy(self._ids[rows]).long(), values

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Ask about the samples that are not in the cache yet."""
        for batch in batches:
            missing = [sample for sample in batch.samples if not self._done[sample]]
            if missing:
                self._run(missing)

    def _rows(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Return where in the cache the learned tokens of a batch are."""
        first = self._first
        return np.concatenate([np.arange(first[one], first[one + 1]) for one in batch.samples])

    def objective(self, batch: Batch) -> Objective:
        """Return w * distillation loss + (1 - w) * task loss of a batch of its samples."""
        heard = self.settings.temperature, self.settings.distill_weight
        every = (target_tokens(batch), *self.says(batch))

        def objective(logits: torch.Tensor, span: slice) -> LossAndGradient:
            tokens, ids, values = (one[span].to(logits.device) for one in every)
            return mixed_loss_and_gradient_(logits, Targets(tokens, ids, values, *heard))

        return objective

    @torch.no_grad()
    def _run(self, samples: Sequence[int]) -> None:
        if self._packed is None:
            device = next(self._model.parameters()).device.type
            with torch.autocast(device, enabled=False):  # whose rounding would look like a leak
                self._packed = can_pack(self._model, self._vocabulary)
        batches = lay_out(
            self._sequences,
            samples,
            packed=self._packed,
            capacity=self._seq_len,
            micro_tokens=micro_tokens(self._model, self._seq_len),
        )
        found: list[tuple[Any, Any]] = []

        def likeliest(logits: torch.Tensor, _: slice) -> LossAndGradient:
            """Add arrays of token ids, int32, and log probabilities, float16: (n, k)."""
            values, ids = F.log_softmax(logits / self.settings.temperature, -1).topk(self._k)
            if not bool(values.isfinite().all()):
                raise UserError("the teacher's logits are not finite; load it in float32")
            found.append((ids.int().cpu().numpy(), values.half().cpu().numpy()))
            return logits.new_zeros(()), None

        for batch in batches:
            found.clear()
            summed_loss(self._model, batch, likeliest)
            ids, values = (np.concatenate(each) for each in zip(*found, strict=True))
            rows = self._rows(batch)
            self._ids[rows], self._values[rows] = ids, values
        # What says that values are there comes to the disk after them.
        self._ids.flush()
        self._values.flush()
        self._done[list(samples)] = 1
        self._done.flush()


def _array(file: Path, dtype: str, shape: tuple[int, ...]) -> Any:
    """Open a file as an array; make it, full of zeros, if it is not there in this size."""
    allocate(file, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


def allocate(file: Path, size: int) -> None:
    """Write ``size`` zeros, unless the file has that size.

    Writing to a hole through a memory map would end the process when the disk is full. Raises
    OSError if there is no room; the file is gone then.
    """
    if file.exists() and file.stat().st_size == size:
        return
    try:
        with file.open("wb") as stream:
            for written in range(0, size, 2**20):
                stream.write(bytes(min(2**20, size - written)))
    except OSError:
        file.unlink(missing_ok=True)
        raise
