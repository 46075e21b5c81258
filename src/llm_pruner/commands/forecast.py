"""What a run of ``prune`` will take, before any of it: seconds and peak memory by stage.

    seconds = overhead * passes of the stage * its tokens * seconds per token of the products with
              all matrices of the model
    bytes = process + weights + cut copy, activations, logits or equations of the stage

The products are measured with the shapes of a block and of the head. Discovery is done, since it
needs no weights. A streamed model holds two blocks and its largest tensor, and reads all blocks for
each pass.
"""

from __future__ import annotations

import math
import time
import timeit
from collections import Counter
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch import nn

from llm_pruner.commands import prune_start as start
from llm_pruner.commands.prune import PruneRun
from llm_pruner.commands.prune_result import RELOAD_LIMIT
from llm_pruner.data.selfmade import PIECE, TEXTS, WRITERS, faster_in_bfloat16
from llm_pruner.data.selfmade import TOKENS as WRITTEN
from llm_pruner.data.text import shares_of
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.importance.boundary_pass import ACTIVATIONS, TOKENS
from llm_pruner.models.checkpoint_files import stored_at
from llm_pruner.models.layers import heaviest_list
from llm_pruner.models.load import load
from llm_pruner.recovery.repair import TRAINED_BYTES
from llm_pruner.runtime.precision import exact_products, fast_matmul
from llm_pruner.runtime.progress import Clock
from llm_pruner.search.divergence import TOGETHER
from llm_pruner.search.layer_trials import LEVELS, judged
from llm_pruner.search.structure_split import TOKENS as HELD_OUT
from llm_pruner.search.structure_split import refit_samples
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.removal import count_parameters

READING, UNPACKING, WRITING = 5e8, 5e7, 3e8
"""Bytes of files a second: of weights that are read, of a ``.gguf``, and that are written."""

OVERHEAD = 1.5
"""Seconds of a pass over those of its matrix products: attention, normalisation, Python."""

ESTIMATE, TAYLOR, REFIT = 2, 4, 1.5
"""Passes over the text: of an estimate by activations and their gradients, of one by gradients of
weights, and of a refit, which runs the dense and the cut model and solves its equations."""

STEP = 3.3
"""The same as ``OVERHEAD``, of a step that writes a token of each text."""


@dataclass(frozen=True)
class Taken:
    """Seconds, and the bytes to which the memory of the process comes."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Forecast:
    """What a run of ``prune`` will take; streamed weights are read block by block."""

    model: str
    parameters: int
    streamed: bool
    why: str
    stages: dict[str, Taken]
    seconds: float
    peak_bytes: int
    saved_bytes: int


def forecast(settings: PruneSettings) -> Forecast:
    """Return what a run will take; UserError as the run would before it begins, or for a GPU."""
    began = time.time()
    if settings.device != "cpu" and torch.cuda.is_available():
        raise UserError("--estimate measures the processor, not a GPU; add --device cpu")
    found = _Forecaster(settings, began)
    if not found.run.weightless:
        found.book_text()
        found.book_choice()
        if not settings.dry_run:
            found.book_cut()
    weights, room, stages = found.total * found.width / 1e9, found.resident / 1e9, found.stages
    why = f"the weights take {weights:.1f} GB, and {room:.1f} GB of memory are for them"
    seconds = sum(one.seconds for one in stages.values())
    peak = max(one.bytes for one in stages.values())
    about = found.loaded.name, found.total, found.streamed, why
    return Forecast(*about, stages, seconds, peak, found.saved)


class _Forecaster:
    """Sizes and rates of a run, and what its stages take by them."""

    def __init__(self, settings: PruneSettings, began: float) -> None:
        self.settings, self.run, self.stages = settings, PruneRun(settings), dict[str, Taken]()
        run, clock = self.run, Clock()
        before = began - psutil.Process().create_time()
        run.check()
        run.check_files()
        clock.stop("text")
        self.loaded = load(settings.computing(), weights=False, reads_tokenizer=True)
        clock.stop("load")
        run.network = model = self.loaded.model
        run.discovery = discover(model)
        clock.stop("discover")
        self.taken, self.process = clock.seconds, psutil.Process().memory_info().rss
        size, blocks = model_size(model), heaviest_list(model)
        if blocks is None:
            raise UserError(f"{type(model).__name__} has no list of blocks")
        self.total, self.count, in_blocks = size.total, len(blocks), size.blocks or 0
        self.width = (size.bytes or 0) // size.total
        self.kept = self.total - self._removed(in_blocks)
        place = stored_at(settings.model, settings.revision)
        packed = place is not None and place.is_file()
        files = self.total * self.loaded.stored_dtype.itemsize
        self.resident = run.stays(settings.room(settings.device))
        fits = self.total * self.width <= self.resident
        self.streamed = not (packed or fits or run.weightless)

        config = model.config.get_text_config()
        shapes = list[tuple[int, int]]()
        for one in blocks[0].parameters():
            if one.ndim > 1:  # of stacked experts, a token takes some
                times = getattr(config, "num_experts_per_tok", 1) if one.ndim > 2 else 1
                shapes += [(one.shape[-2], one.shape[-1])] * times
        self.rows, self.hidden = config.vocab_size, config.hidden_size
        self.inner = max(size for shape in shapes for size in shape)
        self.shapes = [*shapes * self.count, (self.rows, self.hidden)]
        with fast_matmul(model):
            self.each = OVERHEAD * self._products(TOGETHER) / TOGETHER
        with exact_products():
            self.exact = OVERHEAD * self._products(TOGETHER) / TOGETHER
        self.reading = UNPACKING if packed else READING
        self.turn = files * in_blocks / self.total / self.reading if self.streamed else 0.0

        self.weights, self.cut = self.total * self.width, self.kept * self.width
        if self.streamed:
            self.cut = 2 * in_blocks // self.count * self.width
            largest = max(one.numel() for one in model.parameters())
            self.weights = self.cut + largest * self.width
        if run.weightless:
            self.weights = files = 0
        samples, self.length = settings.samples, settings.seq_len
        self.held_out = max(1, min(samples // 8, HELD_OUT // self.length))
        self.held_out *= run.splits or run.tries_layers
        self.scored = min(samples - self.held_out, settings.score_samples or samples)
        self.writes = not WRITERS.keys().isdisjoint(shares_of(settings.calibration))
        self.saved, read = 0, files / self.reading - self.turn
        self.stages["start"] = Taken(before, self.process)
        loading = self.taken["text"] + self.taken["load"] + read
        self._book("load", loading, 0 if self.streamed else files)
        self._book("discover", settings.steps * self.taken["discover"], 0, 2 * run.refits)

    def _removed(self, in_blocks: int) -> int:
        """Return how many parameters are removed, about."""
        run, target = self.run, self.run.target
        if run.plan is not None:
            return self.total - count_parameters(run.discovery, run.plan.removal(run.discovery))
        assert target is not None
        if target.kv_cache is None:
            run.reach()
        of_all = target.unit_ratio is None and target.kv_cache is None
        share = 1 - start.share_kept(target, self.total)
        return int(share * (self.total if of_all else in_blocks))

    def _products(self, tokens: int, dtype: torch.dtype | None = None) -> float:
        """Return the seconds that so many tokens take to be multiplied with all matrices."""
        took = 0.0
        for shape, times in Counter(self.shapes).items():
            weight = torch.randn(shape, dtype=dtype, device="cpu")
            given = torch.randn(tokens, shape[1], dtype=dtype, device="cpu")
            product = partial(nn.functional.linear, given, weight)
            took += times * min(timeit.repeat(product, number=1, repeat=3))
        return took

    def _book(self, stage: str, seconds: float, more: float, turns: float = 0) -> None:
        """Book a stage, ``more`` bytes beside the weights, and so many readings of all blocks."""
        memory = self.process + self.weights + int(more)
        self.stages[stage] = Taken(seconds + turns * self.turn, memory)

    def book_text(self) -> None:
        """Book the calibration text."""
        run, settings, length = self.run, self.settings, self.length
        if not (run.reads_text or run.repairs) or (run.plan is not None and not run.refits):
            return
        if not self.writes:
            self._book("calibration text", self.taken["text"], 0)
            return
        texts = min(settings.samples, max(TEXTS, WRITTEN // min(length, PIECE)))
        steps = math.ceil(settings.samples / texts) * (length - 1)
        copied = faster_in_bfloat16(self.total, self.loaded.model.dtype, "cpu")
        seconds = STEP * steps * self._products(texts, torch.bfloat16 if copied else None)
        cache = texts * length * self.count * 2 * self.hidden * (2 if copied else self.width)
        more = 2 * self.total * copied + cache + 8 * texts * self.rows
        self._book("calibration text", seconds, more, 0 if copied else steps)

    def book_choice(self) -> None:
        """Book estimate and trials: each structure alone, and two shares of each other."""
        run, settings, length = self.run, self.settings, self.length
        if run.plan is not None:
            return
        tokens = self.scored * length * run.criterion.reads_text
        states = min(TOKENS, tokens) * (2 * self.hidden + 3 * self.inner) * 4 * self.count
        more = min(states, ACTIVATIONS) if tokens else 0
        passes = TAYLOR if run.criterion.name == "taylor" else ESTIMATE
        seconds = passes * tokens * settings.steps * self.each
        self._book("estimate", seconds, more, 4 * settings.steps)
        logits = self.cut + (2 * self.held_out * length + 12 * TOGETHER) * self.rows
        names = len(run.selection.structures)
        if run.splits:
            fits = 2 * (run.refits and names > 1)
            trials = names + 2 * (names - 1) + fits
            seconds = (1 + trials) * self.held_out + fits * REFIT * refit_samples(
                self.total, length
            )
            self._book("trials", seconds * length * self.each, logits, 1 + trials + 3 * fits)
        if run.tries_layers:
            whole = torch.empty(self.held_out, length, device="meta")
            trials = len(LEVELS) * self.count
            seconds = (1 + trials) * judged(whole, self.total).numel() * self.each
            self._book("layer trials", seconds, logits, 4 + trials / 8)

    def book_cut(self) -> None:
        """Book what makes the smaller model."""
        run, settings, kept = self.run, self.settings, self.kept
        scenes = sum(math.prod(one.shape) for one in run.discovery.graph.scenes)
        compared = 2 * scenes * self.exact * settings.verify
        stage = "verify" if settings.verify else "cut"
        self._book(stage, compared * settings.steps, self.cut, 2 * settings.verify)
        if run.refits:
            times = (1.0 if self.writes else settings.refit_text) - 1 / 8
            tokens = self.length * settings.samples * times
            more = 3 * self.inner * (self.inner + self.hidden) * 4
            more += TOKENS * (2 * self.hidden + 3 * self.inner) * 4
            seconds = REFIT * tokens * self.each * settings.steps
            self._book("least squares", seconds, self.cut + more, 5 * settings.steps)
        if run.repairs and not self.streamed:
            seconds = 60 * settings.repair_minutes
            self._book("repair", seconds, self.cut + TRAINED_BYTES * kept)
        stored = self.loaded.stored_dtype.itemsize if settings.dtype == "auto" else self.width
        self.saved = kept * stored
        left = 0 if self.streamed else self.cut - self.weights  # the dense weights are given back
        self._book("save", self.saved / WRITING, left, 1)
        if settings.verify and self.total <= RELOAD_LIMIT:
            more = left + self.saved + (4 * kept if stored < 4 else 0)
            self._book("reload", compared + self.saved / WRITING, more, 4)
