"""What a run of ``prune`` will take, before any of it: seconds and peak memory by stage.

Nothing of this is fitted to a machine. The work of each stage is done by its own code on stand-ins
of the model: the first of its blocks at their own sizes, with weights that mean nothing, on tokens
in a row. Of a job that takes t(1) on one block, and t(b, v) on b blocks with a vocabulary v so
small that nothing but the blocks costs, the model of L blocks takes

    seconds = n / s * (t(1) + (L - 1) * (t(b, v) - t(1, v)) / (b - 1))

with n samples of text in place of s. Discovery and the check against the twin read no text: n = s.
A refit is carried out on one block with all of the text, and takes L times as long. Files are read,
widened and written at the rates of this very weight file and disk. Of a streamed model, each pass
reads the bytes of all blocks; its stand-ins have theirs in the type of the files, and in their turn
alone in that of computation.

    bytes = process + weights + copies + rise

``process`` is what this process holds when all that is done; ``weights`` in the type of computation
(of a streamed model none: what it reads in turn is part of the ``rise``); ``copies`` what is made
of the weights: the file's mapped pages while they are loaded, the model that writes text, from the
first trial on what is kept of every block; ``rise`` by how much the job's memory rose on the
stand-in: activations of a block, logits.

What nobody can know before: how many trials the split takes, and what else the machine will do.
"""

from __future__ import annotations

import gc
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from safetensors import safe_open
from torch import nn

from llm_pruner import planning
from llm_pruner.checkpoints.save import SHARD
from llm_pruner.commands import prune_start as start
from llm_pruner.commands.prune import RELOAD_LIMIT, PruneRun
from llm_pruner.commands.refitting import fitted_and_judged, text_to_refit
from llm_pruner.compensation import refit_
from llm_pruner.compensation.least_squares import RIDGES
from llm_pruner.data.calibration import read_calibration
from llm_pruner.data.selfmade import (
    PIECE,
    TEXTS,
    WRITERS,
    draw_tokens,
    faster_in_bfloat16,
    words_of,
)
from llm_pruner.data.selfmade import TOKENS as WRITTEN
from llm_pruner.data.sequences import added_tokens
from llm_pruner.data.text import CHAT, shares_of
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import NeedsMemory, UserError
from llm_pruner.evaluation.footprint import model_size
from llm_pruner.files.outputs import bytes_of, nearest
from llm_pruner.importance import Criterion, score
from llm_pruner.importance.boundary_pass import ACTIVATIONS, TOKENS, as_in
from llm_pruner.models.activation_store import ActivationStore, HiddenStates
from llm_pruner.models.blockwise import NotBlockwise, find_chain
from llm_pruner.models.checkpoint_files import stored_at, stored_size
from llm_pruner.models.forward import Decoder, embedding_rows, is_on_meta, make_room_, tensor_bytes
from llm_pruner.models.layers import heaviest_list, sharing_copy, without_layers
from llm_pruner.models.load import load, without_values
from llm_pruner.models.streaming import stream_
from llm_pruner.models.synchronized_runs import runs_in_step
from llm_pruner.recovery.repair import TRAINED_BYTES
from llm_pruner.runtime.memory import free_bytes, give_back
from llm_pruner.runtime.precision import fast_matmul, mixed_precision
from llm_pruner.runtime.progress import Clock
from llm_pruner.search.divergence import DivergenceMeter, in_parts
from llm_pruner.search.layer_trials import LEVELS, judged
from llm_pruner.search.structure_split import REFIT_RIDGE, hold_out, refit_samples
from llm_pruner.settings.prune import PruneSettings
from llm_pruner.surgery.cut import cut_, cut_copy
from llm_pruner.surgery.removal import count_parameters
from llm_pruner.surgery.verify import cut_verified_, require_same
from llm_pruner.tracing.scenes import long_length
from llm_pruner.types import Discovery, Removal

T = TypeVar("T")

VOCABULARY = 512
"""Of the stand-ins that tell what blocks cost."""

BLOCKS = 3
"""Of the deeper stand-in."""

SAMPLE = 2**27
"""Bytes that are read, and written, to know how fast that is."""

STEPS = 8
"""Tokens that are written to know how long one takes."""


@dataclass(frozen=True)
class Taken:
    """Seconds, and bytes by which the memory of the process rises or to which it comes."""

    seconds: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Forecast:
    """What a run of ``prune`` will take.

    Attributes:
        streamed: whether weights are read block by block; ``why`` says what they need and have.
        rates: bytes a second read, widened to the type of computation, and written.
    """

    model: str
    parameters: int
    streamed: bool
    why: str
    stages: dict[str, Taken]
    seconds: float
    peak_bytes: int
    saved_bytes: int
    rates: dict[str, float]
    took: float


def forecast(settings: PruneSettings) -> Forecast:
    """Return what a run will take; UserError as the run would before it begins, or for a GPU."""
    began = time.time()
    run = PruneRun(settings)
    run.check()
    run.check_files()
    if settings.device.startswith("cuda") or (
        settings.device == "auto" and torch.cuda.is_available()
    ):
        raise UserError(
            "--estimate measures the processor, and the run would be on a GPU; add --device cpu"
        )
    before = began - psutil.Process().create_time()
    return _Forecaster(run, before, began).made()


class _Forecaster:
    """The model without weights, the stand-ins' measurements, and what follows."""

    def __init__(self, run: PruneRun, before: float, began: float) -> None:
        self.run, self.settings, self.began = run, run.settings, began
        settings = self.settings
        begin = time.perf_counter()
        self.loaded = load(settings.computing(), weights=False, reads_tokenizer=True)
        self.model: Any = self.loaded.model
        self.stages = {"start": Taken(before), "load": Taken(time.perf_counter() - begin)}
        blocks = heaviest_list(self.model)
        if blocks is None:
            raise UserError(f"{type(self.model).__name__} has no list of blocks to estimate from")
        self.path = next(name for name, one in self.model.named_modules() if one is blocks)
        size = model_size(self.model)
        self.total, self.blocks, self.bytes = size.total, size.blocks or 0, size.bytes or 0
        stored = stored_size(settings.model, settings.revision, "auto")
        place = stored_at(settings.model, settings.revision)
        # Of what is not on this machine yet, the config says how large its files are.
        fetched = self.total * self.loaded.stored_dtype.itemsize
        self.file_bytes = fetched if stored is None else stored[1]
        if place is not None and place.is_file():
            self.file_bytes = place.stat().st_size
        self.room = settings.room(settings.device)
        in_blocks = stored is None or stored[0] is not None
        self.resident = self.run.stays(self.room)
        self.streamed = in_blocks and self.bytes > self.resident
        if self.streamed and self.bytes <= self.room and not self._goes_by_block():
            self.resident, self.streamed = self.room, False
        self.removed, self.rounds = self._removed(), settings.steps
        self.refitted = 0  # bytes of the new weights, beside the old ones until all are judged
        self._read_text()

    def _goes_by_block(self) -> bool:
        """Whether a stand-in's weights can be read for their turn; else a run starts over with all
        of them in memory."""
        if not is_on_meta(self.model):
            return True
        try:
            model = self._weighted(min(2, self._count()), VOCABULARY)
            if self.run.plan is None and self.run.criterion.reads_text:
                find_chain(model.requires_grad_(False), _tokens(1, 8, VOCABULARY), {})
        except (NeedsMemory, NotBlockwise):
            return False
        return True

    def _removed(self) -> float:
        """Return the share of the blocks that goes, about."""
        run, settings, total = self.run, self.settings, self.total
        if run.plan is not None:
            discovery = discover(self.model)
            gone = total - count_parameters(discovery, run.plan.removal(discovery))
        else:
            assert run.target is not None
            run.network, run.discovery = self.model, discover(self.model)
            run.narrow()
            if settings.kv_cache is None and settings.round_to != "auto":
                run.reach()
            share = 1 - start.share_kept(run.target, total)
            # Of units, a share of the blocks is meant.
            by_units = settings.unit_ratio is not None or settings.kv_cache is not None
            gone = int(share * (self.blocks if by_units else total))
        return min(0.9, gone / self.blocks)

    def _read_text(self) -> None:
        """Read the text if it is in a file; how many samples there are."""
        settings, run = self.settings, self.run
        self.samples, self.length = settings.samples, settings.seq_len
        self.writes = not WRITERS.keys().isdisjoint(shares_of(settings.calibration))
        self.reads = run.refits or run.repairs or (run.plan is None and run.reads_text)
        if self.reads and not self.writes:
            begin = time.perf_counter()
            text = read_calibration(self.loaded, settings, settings.seed, Clock())
            self.samples = len(text.input_ids)
            if run.refits:
                self.fitted = len(text_to_refit(self.loaded, settings, text)[0])
            self.stages["calibration text"] = Taken(time.perf_counter() - begin)
        whole = torch.empty(self.samples, self.length, device="meta")
        if self.writes or not self.reads:
            self.fitted = len(fitted_and_judged(whole)[0])
            if not WRITERS.keys() >= shares_of(settings.calibration).keys():
                self.fitted += round((settings.refit_text - 1) * self.samples)
        held_out, scored = hold_out(whole) if run.splits or run.tries_layers else (whole[:0], whole)
        self.held_out = len(held_out)
        self.scored = len(scored[: settings.score_samples])
        self.batch = min(self.scored, max(1, TOKENS // self.length))
        self.texts = min(self.samples, max(TEXTS, WRITTEN // min(self.length, PIECE)))

    def made(self) -> Forecast:
        """Measure, and put together what each stage takes."""
        self.write = _write_rate(self.settings.out)
        if self.file_bytes > free_bytes("cpu"):
            _forget_files(self.settings)
        self.read, self.widen = _read_rates(self.settings, self.write)
        self._measure()
        self._put_together()
        stages = {name: one for name, one in self.stages.items() if one != Taken()}
        kind = str(self.model.dtype).removeprefix("torch.")
        return Forecast(
            model=self.loaded.name,
            parameters=self.total,
            streamed=self.streamed,
            why=f"the weights take {self.bytes / 1e9:.1f} GB in {kind}, and "
            f"{self.resident / 1e9:.1f} GB of memory are for them",
            stages=stages,
            seconds=sum(one.seconds for one in stages.values()),
            peak_bytes=max(one.bytes for one in stages.values()),
            saved_bytes=self.saved,
            rates={"read": self.read, "widened": self.widen, "written": self.write},
            took=time.time() - self.began,
        )

    # --------------------------------------------------------------------------- what is measured

    def _measure(self) -> None:
        """Find what each job takes on all blocks, and what the process holds when that is done."""
        count = self._count()
        deeper = min(count, BLOCKS, self._fitting())
        first = self._jobs_on(1, VOCABULARY)
        deep = self._jobs_on(deeper, VOCABULARY) if deeper > 1 else {}
        whole = self._jobs_on(1, None)
        self.jobs: dict[str, Taken] = {}
        self.refitted *= 0 if self.streamed else count
        for job, one in first.items():
            each, held = one.seconds, 0
            once = whole.get(job, one)  # no refit comes to the head
            if job in deep:
                more = max(0.0, deep[job].seconds - each) / (deeper - 1)
                each = min(more, deep[job].seconds / deeper)  # what is more is but chance
                held = max(0, deep[job].bytes - one.bytes) * (count - 1) // (deeper - 1)
            # Blocks that are read in turn are run again: no activations of others are held then.
            held = min(held, ACTIVATIONS) if job == "estimate" and not self.streamed else 0
            self.jobs[job] = Taken(once.seconds + each * (count - 1), once.bytes + held)
        _give_back()
        self.process = psutil.Process().memory_info().rss

    def _fitting(self) -> int:
        """Return how many blocks fit into memory with a cut copy of them, at least one."""
        if self.run.weightless:
            return BLOCKS
        width, free = self.bytes // self.total, free_bytes("cpu")
        block, ends = 2 * width * self.blocks // self._count(), width * (self.total - self.blocks)
        if "hidden" in self.run.selection.structures:
            ends *= 2
        if block + ends > free:
            raise UserError(
                f"--estimate measures a block, embedding and head, of {(block + ends) / 1e9:.3g} "
                f"GB with a cut copy, and {free / 1e9:.3g} GB of memory are free; free some, or "
                "leave it out"
            )
        return max(1, free // block)

    def _jobs_on(self, blocks: int, vocabulary: int | None) -> dict[str, Taken]:
        """Do the work of all stages on a stand-in; return what each job took."""
        run, settings, found = self.run, self.settings, dict[str, Taken]()
        job: Any = partial(discover, self._stand_in(blocks, vocabulary, "meta"))
        found["discover"], discovery = _taken(job)
        if run.weightless:
            return found
        discovery = self._at_length(discovery)
        model = self._weighted(blocks, vocabulary)
        rows = embedding_rows(model)
        ids = _tokens(self.batch, self.length, rows)
        if self.reads and self.writes:
            short = self._filled(blocks, vocabulary, torch.bfloat16) if self._copies() else model
            found["token"] = self._token(short, rows)
        removal = self._plan(model, discovery, ids, found)
        if run.splits or run.tries_layers:
            with mixed_precision(model):
                part = in_parts(ids)[0]
                self.together = part.numel()
                meter_of = partial(DivergenceMeter, model, part)
                found["dense logits"], meter = _taken(meter_of)
                job = partial(meter.of, cut_copy(model, discovery, removal))
                found["trial"], _ = _taken(job)
        if run.refits and blocks == 1 and vocabulary is not None:  # no refit comes to the head
            self._refits(model, discovery, removal, found)
        if settings.dry_run:
            return found
        cut: Any = cut_verified_ if settings.verify else cut_
        found["verify"], done = _taken(partial(cut, model, discovery, removal))
        verified = done[1] if settings.verify else None
        again = partial(require_same, model, sharing_copy(model), discovery, verified)
        found["reload"], _ = _taken(again)
        return found

    def _refits(
        self, model: nn.Module, discovery: Discovery, removal: Removal, found: dict[str, Taken]
    ) -> None:
        """Refit a block on as much text as there will be, and as much as trials have."""
        tried = min(self.scored, refit_samples(self.total, self.length))
        given = REFIT_RIDGE, REFIT_RIDGE
        jobs = {"refit": (self.fitted, RIDGES), "trial refit": (tried, given)}
        for name, (samples, ridges) in jobs.items():
            if name != "refit" and not self.run.splits:
                continue
            pruned = cut_copy(model, discovery, removal)
            ids = _tokens(max(2, samples), self.length, embedding_rows(model))
            job = partial(refit_, pruned, model, discovery, removal, ids, ridges)
            with mixed_precision(model), closing(self._states(model, ids[: self.scored])) as known:
                found[name], done = _taken(partial(job, known=known))
            weights = (pruned.get_submodule(one.module).get_parameter("weight") for one in done)
            self.refitted = sum(weight.nbytes for weight in weights)

    def _states(self, model: Any, ids: torch.Tensor) -> HiddenStates:
        """Return hidden states of any values where an estimate will have left some."""
        states = HiddenStates()
        if self.run.plan is None and self.run.criterion.reads_text:
            store = ActivationStore(range(2), len(ids), memory=0)
            size = model.config.get_text_config().hidden_size
            for boundary in store.keys:
                for sample in range(len(ids)):
                    values = torch.randn(1, ids.shape[1], size, dtype=model.dtype, device="cpu")
                    store.write(boundary, slice(sample, sample + 1), values)
            states.keep(ids, store)
        return states

    def _plan(
        self, model: nn.Module, discovery: Discovery, ids: torch.Tensor, found: dict[str, Taken]
    ) -> Removal:
        """Return a removal of the share that is to go, by importance on one batch of text."""
        criterion = self.run.criterion if self.run.plan is None else Criterion("random")
        kinds = {group.kind for group in discovery.groups if group.frozen is None}
        wanted = tuple(one for one in self.run.selection.structures if one in kinds)
        if not wanted:  # layers, of which there is one: the work is that of another cut
            wanted, criterion = tuple(sorted(kinds & {"heads", "ffn"})), Criterion("random")
        selection = planning.Selection(structures=wanted)
        numbering = planning.Numbering.dense(discovery)
        names = planning.scored_groups(discovery, selection, numbering)
        real = as_in(self._count(), embedding_rows(self.model), streamed=self.streamed)
        with fast_matmul(model), real:
            job = partial(score, model, discovery, criterion, seed=0, groups=names)
            found["estimate"], scores = _taken(partial(job, input_ids=ids[: self.batch]))
        dense = model_size(model)
        goal = dense.total - int(self.removed * (dense.blocks or 0))
        target = planning.Target(params=goal, loose=True)
        return planning.allocate(discovery, scores, selection, target, numbering)

    def _stand_in(
        self, blocks: int, vocabulary: int | None, device: str, dtype: torch.dtype | None = None
    ) -> Any:
        """Return a model of the first blocks, without values on ``meta``, in that of computation if
        no other type is named."""
        short: Any = without_layers(self.model, self.path, range(blocks, self._count()))
        if not is_on_meta(self.model):
            return deepcopy(short)  # sizes that no config says: it has its weights
        text = short.config.get_text_config()
        if vocabulary is not None:
            text.vocab_size = vocabulary
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                setattr(text, name, None)
        trusts = self.settings.trust_remote_code
        return without_values(short.config, dtype or self.model.dtype, trusts, device).eval()

    def _filled(self, blocks: int, vocabulary: int | None, dtype: torch.dtype | None) -> Any:
        """Return a stand-in with weights."""
        model = self._stand_in(blocks, vocabulary, "cpu", dtype)
        _fill_(model)
        return model if dtype is None else model.to(dtype)

    def _weighted(self, blocks: int, vocabulary: int | None) -> Any:
        """Return a stand-in whose weights are read as those of the run are."""
        if not self.streamed:
            return self._filled(blocks, vocabulary, None)
        model = self._filled(blocks, vocabulary, self.loaded.stored_dtype)
        stream_(model, self.model.dtype)
        return model

    def _count(self) -> int:
        return len(self.model.get_submodule(self.path))

    def _at_length(self, discovery: Discovery) -> Discovery:
        """Return what was found, with long input as long as the whole model is run on."""
        length, _ = long_length(self.model, embedding_rows(self.model))
        scenes = tuple(
            replace(one, shape=(one.shape[0], length)) if one.shape[1] > 8 else one
            for one in discovery.graph.scenes
        )
        return replace(discovery, graph=replace(discovery.graph, scenes=scenes))

    def _token(self, model: Any, rows: int) -> Taken:
        """Return what one more token of each text takes, behind half of them."""
        half = max(1, min(self.length, PIECE) // 2)
        ids = _tokens(self.texts, half, rows)
        uniform = torch.full((self.texts,), 0.5, dtype=torch.float64, device="cpu")
        decoder = Decoder(model)
        decoder.step(ids)
        make_room_(decoder.cache, half + STEPS)

        def write() -> None:
            for _ in range(STEPS):
                logits = decoder.step(ids[:, :1])
                draw_tokens(
                    logits.float(), uniform, torch.empty(0, dtype=torch.int64, device="cpu")
                )

        taken, _ = _taken(write)
        return Taken(taken.seconds / STEPS, taken.bytes + tensor_bytes(decoder.cache))

    def _copies(self) -> bool:
        """Whether a copy of the model in bfloat16 writes the text."""
        fits = not self.streamed or 2 * self.total <= self.room
        return fits and faster_in_bfloat16(self.total, self.model.dtype, "cpu")

    # ------------------------------------------------------------------------- what follows of it

    def _put_together(self) -> None:
        """Book every stage."""
        run = self.run
        self.width = self.bytes // self.total
        kept_blocks = int((1 - self.removed) * self.blocks)
        self.kept = self.total - self.blocks + kept_blocks
        # The cut makes more of weights in memory.
        self.weights, self.cut = self.bytes, kept_blocks * self.width
        self.in_blocks, found = 0.0, 0
        if self.streamed:
            blocks = {id(one) for one in self.model.get_submodule(self.path).parameters()}
            ends = (one for one in self.model.parameters() if id(one) not in blocks)
            # What is read in turn is among what the stand-ins took; discovery's has no weights.
            self.weights = self.cut = 0
            found = self.width * max((one.numel() for one in ends), default=0)
            found += self.blocks * self.width // self._count()
            self.in_blocks = self.file_bytes * self.blocks / self.total
        read = self.file_bytes - self.in_blocks
        if run.weightless:
            self.weights, read = 0, 0.0
        mapped = 0 if self.streamed or run.weightless else self.file_bytes
        fixed = self.stages["load"].seconds
        self.stages["start"] = replace(self.stages["start"], bytes=self.process)
        self._book("load", fixed + read / self.read + read / self.widen, mapped)
        # That the model is a chain of blocks, as a refit needs it, is seen in two passes.
        passes = 2 * (run.refits and not run.weightless)
        seconds = self._of("discover", self.rounds) + passes * self.in_blocks / self.widen
        self._book("discover", seconds, found + self._rise("discover"), passes)
        self.saved = 0
        if not run.weightless:
            self._book_text()
            self._book_choice()
            if not self.settings.dry_run:
                self._book_cut()
                self._book_save()

    def _book(self, stage: str, seconds: float, more: int, passes: int = 0) -> None:
        """Book a stage, ``more`` bytes beside the weights, and its passes of a streamed model."""
        seconds += passes * self.in_blocks / self.read
        self.stages[stage] = Taken(seconds, self.process + self.weights + more)

    def _of(self, job: str, times: float = 1.0) -> float:
        return times * self.jobs[job].seconds

    def _rise(self, *jobs: str) -> int:
        return max(self.jobs[job].bytes for job in jobs)

    def _book_text(self) -> None:
        if self.reads and self.writes:
            copied = self.total * 2 if self._copies() else 0
            tokens = self._steps_of_text()
            seconds = self._of("token", tokens)
            seconds += _words_seconds(self.loaded.tokenizer, self.model)
            more = copied + self._rise("token")
            self._book("calibration text", seconds, more, 0 if copied else tokens)
        elif self.reads:
            self._book("calibration text", self.stages.pop("calibration text").seconds, 0)

    def _steps_of_text(self) -> int:
        """Return in how many steps, of a token for each text, the model writes its shares."""
        shares, steps = shares_of(self.settings.calibration), 0
        for source in WRITERS.keys() & shares.keys():
            windows = self.samples * shares[source] / sum(shares.values())
            piece = min(self.length, PIECE)
            if source == CHAT:
                piece = self.length * max(1, PIECE // self.length)
            texts = math.ceil(windows * self.length / piece)
            steps += math.ceil(texts / self.texts) * (piece - 1)
        return steps

    def _book_choice(self) -> None:
        """Book estimate and trials: each structure alone, two shares of each other, two refitted.

        How many trials there are depends on what they find: up to four shares of each other one.
        Then each layer alone, of the structure that has most of the budget.
        """
        run, rounds = self.run, self.rounds
        if run.plan is None:
            times = rounds * (self.scored / self.batch if run.criterion.reads_text else 1)
            more = self._rise("estimate")
            # Two of four see that the model is a chain; a refit has seen it, but of no gradients.
            known = run.refits and run.criterion.name != "taylor"
            passes = 4 * rounds - 2 * known
            self._book("estimate", self._of("estimate", times), more, passes)
        if run.splits:
            self._book_splits()
        if run.tries_layers:
            trials = len(LEVELS) * self._count()
            some = judged(torch.empty(self.held_out, self.length, device="meta"), self.total)
            parts = in_parts(some)
            seconds = self._of("dense logits", some.numel() / self.together)
            seconds += self._of("trial", trials * some.numel() / self.together)
            count = runs_in_step(self.model, parts[0].numel())
            times = 4 + math.ceil(trials * len(parts) / count)
            more = self.cut + self._dense_logits() + self._rise("trial")
            self._book("layer trials", seconds, more, times)

    def _book_splits(self) -> None:
        run = self.run
        structures = len(run.selection.structures)
        trials = structures + 2 * (structures - 1)
        refitted = 2 if run.refits and structures > 1 else 0
        parts = self.held_out * self.length / self.together
        seconds = self._of("dense logits", parts)
        seconds += self._of("trial", parts * (trials + refitted))
        jobs = ["trial"]
        if refitted:
            seconds += self._of("trial refit", refitted)
            jobs.append("trial refit")
        more = self.cut + self._dense_logits() + self._rise(*jobs)
        more += self.refitted if refitted else 0
        self._book("trials", seconds, more, 1 + trials + 3 * refitted)

    def _dense_logits(self) -> int:
        return 2 * self.held_out * self.length * embedding_rows(self.model)

    def _book_cut(self) -> None:
        """Book the cut, its check, the refit and the repair."""
        settings, rounds = self.settings, self.rounds
        stage = "verify" if settings.verify else "cut"
        more, passes = self.cut + self._rise("verify"), 2 * rounds * settings.verify
        self._book(stage, self._of("verify", rounds), more, passes)
        if self.run.refits:
            more = self.cut + self.refitted + self._rise("refit")
            self._book("least squares", self._of("refit", rounds), more, 5 * rounds)
        if self.run.repairs and not self.streamed:
            trained = TRAINED_BYTES * self.kept
            fits = trained < free_bytes("cpu") - self.weights
            more = self.cut + (trained if fits else 0)
            self._book("repair", 60 * settings.repair_minutes, more)

    def _book_save(self) -> None:
        settings = self.settings
        stored = self.loaded.stored_dtype.itemsize if settings.dtype == "auto" else self.width
        self.saved = self.kept * stored
        shard = min(self.saved, bytes_of(settings.max_shard_size), bytes_of(SHARD))
        more = shard if self.streamed else self.kept * self.width - self.weights
        self._book("save", self.saved / self.write, more, 1)
        if settings.verify and self.total <= RELOAD_LIMIT:
            # What was just written is in memory: reading it takes no longer than writing did.
            seconds = self._of("reload") + self.saved / self.write
            again = self.saved if self.saved <= self.room else 0
            # Models in a shorter type are compared in float32, one after the other.
            wider = 4 * self.kept if stored < 4 else 0
            more = again if self.streamed else self.saved + again + wider - self.weights
            self._book("reload", seconds, more + self._rise("reload"), 4)


def _tokens(samples: int, length: int, rows: int) -> torch.Tensor:
    return torch.arange(samples * length, device="cpu").mul(7).remainder(rows).view(samples, length)


def _give_back() -> None:
    """Give back what stand-ins held, too, of which blocks that are read in turn know themselves."""
    gc.collect()
    give_back()


def _taken(job: Callable[[], T]) -> tuple[Taken, T]:
    """Do a job; return what it took, and its result."""
    _give_back()
    process = psutil.Process()
    before = most = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin = time.perf_counter()
    try:
        result = job()
        seconds = time.perf_counter() - begin
    finally:
        done.set()
        watcher.join()
    return Taken(seconds, max(most, process.memory_info().rss) - before), result


@torch.no_grad()
def _fill_(model: nn.Module) -> None:
    """Give weights values of the size of trained ones, the same ones over and over."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(2**20, device="cpu").uniform_(-0.05, 0.05, generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for part in parameter.view(-1).split(len(values)):
            part.copy_(values[: len(part)])


def _forget_files(settings: PruneSettings) -> None:
    """Have weight files read from the disk, as a run has to that finds no room for all of them."""
    place = stored_at(settings.model, settings.revision)
    if place is None or not hasattr(os, "posix_fadvise"):
        return
    for file in [place] if place.is_file() else place.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_rates(settings: PruneSettings, written: float) -> tuple[float, float]:
    """Return bytes of the weight files that are read in a second, and widened when they are.

    Those that are not on this machine yet are taken to be read as fast as the output is written.
    """
    place = stored_at(settings.model, settings.revision)
    if place is not None and place.is_file():
        return _unpacking_rate(place), math.inf
    kind = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    bytes_, read, widened = 0, 0.0, 0.0
    for file in [] if place is None else sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            for name in names[:: max(1, len(names) // 16)]:
                if bytes_ >= SAMPLE:
                    break
                begin = time.perf_counter()
                tensor = tensors.get_tensor(name)
                tensor.flatten().view(torch.uint8).max()  # reads all of it and makes nothing
                middle = time.perf_counter()
                tensor.to(kind, copy=True)
                read, widened = read + middle - begin, widened + time.perf_counter() - middle
                bytes_ += tensor.nbytes
    if not bytes_:
        tensor = torch.zeros(SAMPLE // 2, dtype=torch.bfloat16, device="cpu")
        begin = time.perf_counter()
        tensor.to(kind, copy=True)
        return written, tensor.nbytes / (time.perf_counter() - begin)
    return bytes_ / read, bytes_ / widened


def _unpacking_rate(file: Path) -> float:
    """Return bytes of a ``.gguf`` file that are unpacked in a second."""
    from gguf import GGUFReader, dequantize

    tensors = GGUFReader(file).tensors
    read, begin = 0, time.perf_counter()
    for tensor in tensors[:: max(1, len(tensors) // 16)]:
        if read < SAMPLE // 8:
            dequantize(tensor.data, tensor.tensor_type)
            read += int(tensor.n_bytes)
    return read / (time.perf_counter() - begin)


def _write_rate(out: Path) -> float:
    """Return bytes written a second where the output will be; the file has no name."""
    block = bytes(2**20)
    folder = nearest(out) if nearest(out).is_dir() else nearest(out).parent
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        for _ in range(SAMPLE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return SAMPLE / (time.perf_counter() - begin)


def _words_seconds(tokenizer: Any, model: Any) -> float:
    """Return what looking through the vocabulary for first words takes."""
    prefix, _ = added_tokens(tokenizer)
    if prefix:
        return 0.0
    begin = time.perf_counter()
    words_of(tokenizer, embedding_rows(model) // 16)
    return 16 * (time.perf_counter() - begin)
