"""What a run is asked to do, as values that the stages share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelSettings:
    """How a model is loaded.

    Attributes:
        source: hub id, local folder, ``.gguf`` file, or ``default``.
        revision: branch, tag or commit on the hub.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the checkpoint has.
        device: such as ``cpu``, ``cuda`` or ``auto``.
        trust_remote_code: run Python code that comes with the model.
    """

    source: str
    revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class CalibrationSettings:
    """Text that importance is estimated on, and that compensation fits.

    Attributes:
        source: ``self``, a hub dataset, or a local file; several, parted by commas, give equally
            many samples each.
        samples: number of sequences.
        seq_len: tokens of each.
        split: split of a hub dataset.
        text_field: field that holds the text.
        score_samples: the estimate reads this many of the samples; None: all. What is fitted by
            least squares gains more from text than a ranking does.
        kept: folder that keeps the text of ``self``, for other stages of the same run.
    """

    source: str = "self"
    samples: int = 128
    seq_len: int = 128
    split: str | None = None
    text_field: str | None = None
    score_samples: int | None = None
    kept: Path | None = None
