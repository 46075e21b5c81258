"""Text for the estimate, the trials and the refit of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from llm_pruner.data.calibration import Calibration, build_calibration
from llm_pruner.data.text import SELF, load_documents, sources_of
from llm_pruner.errors import UserError
from llm_pruner.models.load import LoadedModel
from llm_pruner.runtime.progress import Clock
from llm_pruner.search.structure_split import TOKENS as SPLIT_TOKENS
from llm_pruner.settings.common import CalibrationSettings
from llm_pruner.settings.limits import MOST, check_number


def check_calibration(calibration: CalibrationSettings) -> None:
    """Raise UserError if the calibration text cannot be read."""
    if calibration.samples < 1:
        raise UserError(f"samples={calibration.samples} calibrates on nothing; use at least 1")
    if calibration.score_samples is not None and calibration.score_samples < 1:
        raise UserError(
            f"score_samples={calibration.score_samples} estimates on nothing; use at least 1"
        )
    if (calibration.score_samples or 0) > calibration.samples:
        raise UserError(
            f"score_samples={calibration.score_samples} of {calibration.samples} samples cannot be "
            "read; ask for more samples, or for fewer of them"
        )
    if calibration.seq_len < 2:
        raise UserError(f"seq_len={calibration.seq_len} predicts no token; use at least 2")
    check_number("samples", calibration.samples, 1, MOST)
    check_number("seq_len", calibration.seq_len, 2, 2**24)
    for source in sources_of(calibration.calibration):
        if source == SELF:
            continue
        # A local file is read whole, so that a broken line far down shows now. Of a dataset the
        # beginning says whether it is there.
        load_documents(
            source,
            split=calibration.text_split,
            text_field=calibration.text_field,
            limit=None if Path(source).expanduser().exists() else 1000,
        )


def read_calibration(
    loaded: LoadedModel, calibration: CalibrationSettings, seed: int, clock: Clock
) -> Calibration:
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name} has no tokenizer, so no text can be read; add one")
    text = build_calibration(
        calibration.calibration,
        loaded.tokenizer,
        samples=calibration.samples,
        seq_len=calibration.seq_len,
        seed=seed,
        model=loaded.model,
        text_field=calibration.text_field,
        split=calibration.text_split,
        kept=calibration.kept,
    )
    clock.stop("calibration text")
    return text


def hold_out(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples for judging and the rest: an eighth, at most ``SPLIT_TOKENS`` tokens.

    They are the last ones, because packed samples share documents with their neighbours.
    """
    count = max(1, min(len(tokens) // 8, SPLIT_TOKENS // tokens.shape[1]))
    if len(tokens) < 2:
        raise UserError(
            "trials need text of their own and there is 1 calibration sample; give more samples, "
            "or say the split yourself"
        )
    return tokens[-count:], tokens[:-count]
