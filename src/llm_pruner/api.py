"""The steps of ``prune`` and ``recover`` as functions over one model in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.checkpoints.save import round_, stored_as
from llm_pruner.commands.curve import CurveRun, check_text
from llm_pruner.commands.prune import PruneRun
from llm_pruner.commands.refitting import Refitter, fitted_and_judged
from llm_pruner.data.calibration import Calibration, read_calibration
from llm_pruner.data.text import PRUNED, Protocol, load_evaluation_text
from llm_pruner.discovery.groups import discover as discover_groups
from llm_pruner.errors import UserError
from llm_pruner.evaluation.answers import written
from llm_pruner.evaluation.health import Health, health_prompts, own_prompts
from llm_pruner.evaluation.health import health as measure_health
from llm_pruner.evaluation.perplexity import PerplexityResult
from llm_pruner.evaluation.perplexity import perplexity as measure_perplexity
from llm_pruner.files.disk import expanded
from llm_pruner.importance import Criterion
from llm_pruner.importance import score as score_groups
from llm_pruner.models.forward import check_length, dtype_name, module_of, token_ids
from llm_pruner.models.layers import own_copy, sharing_copy
from llm_pruner.models.load import LoadedModel, load_model
from llm_pruner.planning import Plan
from llm_pruner.report.records import CurvePoint
from llm_pruner.runtime.precision import fast_matmul, multiplies_bfloat16
from llm_pruner.runtime.processes import check_trains
from llm_pruner.runtime.progress import Clock
from llm_pruner.settings.common import CalibrationSettings
from llm_pruner.settings.curve import RATIOS, CurveSettings
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.prune import READ_BY, PlanSettings, PruneSettings
from llm_pruner.settings.recover import RecoverSettings, TrainingSettings
from llm_pruner.surgery.pruner import Surgeon
from llm_pruner.surgery.removal import checked_removal
from llm_pruner.surgery.verify import prune_ as prune_module_
from llm_pruner.types import Discovery, Edits, FloatArray, Removal

if TYPE_CHECKING:
    from llm_pruner.recovery import Outcome

_NEW = Path("new")  # where a path is asked for and nothing is written


class Model:
    """A language model with its tokenizer, and what was done to it since it was loaded.

    Attributes:
        network: the model of transformers, in eval mode.
        tokenizer: None where there is none.
        groups: of the dense model; None before `discover`.
        plan: what was removed; None before `prune_`.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.network: Any = loaded.model
        self.tokenizer = loaded.tokenizer
        self.groups: Discovery | None = None
        self.plan: Plan | None = None
        self._dense_config = deepcopy(self.network.config)
        self._surgeon: Surgeon | None = None  # once it was cut
        self._removed: Removal = {}  # in dense numbering
        self._refitter: Refitter | None = None

    @property
    def current(self) -> LoadedModel:
        """What was loaded, as it is now."""
        return replace(self.loaded, model=self.network, tokenizer=self.tokenizer)

    def require_dense(self) -> None:
        """Raise UserError if it was pruned."""
        if self._surgeon is not None:
            raise UserError("this model was pruned before; load the dense one again")

    def save(
        self, out: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB"
    ) -> Path:
        """Write a folder that ``from_pretrained`` loads; weights in the type they were stored in.

        Raises:
            UserError: the folder is there, and ``overwrite`` is not set.
        """
        out = expanded(out)
        with stored_as(self.network, self.loaded.stored_dtype):
            save_checkpoint(
                self.network,
                out,
                edits=Edits() if self._surgeon is None else self._surgeon.edits,
                plan_json=None if self.plan is None else self.plan.to_json(),
                tokenizer=self.tokenizer,
                processor=self.loaded.processor,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
                dense_config=self._dense_config,
            )
        return out


class Scores(dict[str, FloatArray]):
    """Group name -> importance of its units, shape (size,); higher means keep.

    Attributes:
        criterion: what was measured.
        text: on what; None if nothing was read, or bare tokens.
        seed: of the criterion ``random``.
    """

    def __init__(
        self,
        values: Mapping[str, FloatArray],
        criterion: Criterion | str,
        text: Calibration | None,
        seed: int,
    ) -> None:
        super().__init__(values)
        self.criterion, self.text, self.seed = _criterion(criterion), text, int(seed)


class _Presets:
    """Settings that go together, by the names of ``--preset``; keywords win over theirs.

    ``presets.paper(ratio=0.2)`` is ``presets("paper", ratio=0.2)``.
    """

    def __call__(self, name: str | Path, **settings: Any) -> PlanSettings:
        return PlanSettings(preset=str(name), **settings)

    def __getattr__(self, name: str) -> Callable[..., PlanSettings]:
        if name not in PlanSettings.presets:
            raise AttributeError(f"no preset {name!r}; known are {', '.join(PlanSettings.presets)}")
        return partial(self, name)

    def __dir__(self) -> list[str]:
        return list(PlanSettings.presets)


presets = _Presets()


def Taylor(order: str = "first", **how: str) -> Criterion:  # noqa: N802
    """Return the criterion of the paper; ``how``: ``reduction`` and ``aggregate``."""
    return Criterion("taylor", order, **how)


def Lora(rank: int | None = None, **settings: Any) -> TrainingSettings:  # noqa: N802
    """Return settings of training with low-rank adapters, of rank 8 unless a preset says otherwise.

    Keywords are the options of ``recover`` that say how it trains.
    """
    return TrainingSettings(**settings | {"lora_r": rank})


def _criterion(given: Criterion | str) -> Criterion:
    return Criterion(given) if isinstance(given, str) else given


def _tokens(text: Any, network: nn.Module) -> torch.Tensor:
    return text.input_ids if isinstance(text, Calibration) else token_ids(text, network)


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Model:
    """Load a model: a hub id, a local folder, a ``.gguf`` file or ``default``.

    Raises:
        UserError: it cannot be loaded, and why.
    """
    how: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device}
    return Model(load_model(str(model), trust_remote_code=trust_remote_code, **how))


def calibration(
    model: Model,
    source: str | Path = "self",
    *,
    samples: int = 128,
    seq_len: int = 128,
    seed: int = 0,
    text_split: str | None = None,
    text_field: str | None = None,
) -> Calibration:
    """Return calibration text: ``self`` (the model writes it), a hub dataset or a local file.

    Raises:
        UserError: it cannot be read, or holds too few tokens.
    """
    how: dict[str, Any] = {"samples": samples, "seq_len": seq_len}
    how |= {"text_split": text_split, "text_field": text_field}
    asked = CalibrationSettings(calibration=str(source), **how)
    return read_calibration(model.current, asked, int(seed), Clock())


def discover(model: Model | LoadedModel | nn.Module, **how: Any) -> Discovery:
    """Return the groups of units that must be removed together; see ``discovery.discover``.

    Args:
        how: ``forward``, which runs it, or ``tokens`` to run it on, shape (batch, sequence).

    Raises:
        DiscoveryError: the model could not be run.
    """
    if not isinstance(model, Model):
        return discover_groups(module_of(model), **how)
    if how:
        model.require_dense()
    if how or model.groups is None:
        model.groups = discover_groups(model.network, **how)
    return model.groups


def score(
    model: Model | LoadedModel | nn.Module,
    discovery: Discovery,
    criterion: Criterion | str,
    text: Calibration | ArrayLike | None = None,
    *,
    seed: int = 0,
    groups: Collection[str] | str | None = None,
) -> Scores:
    """Return the importance of every unit of the groups; see ``importance.score``.

    Args:
        model: the dense model.
        discovery: the groups, from `discover`.
        criterion: such as ``Taylor()``, ``Criterion("fisher")`` or ``"fisher"``.
        text: from `calibration`, or token ids, integers of shape (samples, seq_len).
        seed: of the criterion ``random``.
        groups: names of those to score, or one; None: all that are not frozen.

    Raises:
        UserError: nothing can be scored so; or the model is not the one of the groups.
    """
    if isinstance(model, Model):
        model.require_dense()
    network, criterion = module_of(model), _criterion(criterion)
    tokens = None if text is None else _tokens(text, network)
    with fast_matmul(network):
        found = score_groups(
            network, discovery, criterion, input_ids=tokens, seed=seed, groups=groups
        )
    return Scores(found, criterion, text if isinstance(text, Calibration) else None, seed)


def plan(model: Model, groups: Discovery, scores: Scores | None, settings: PlanSettings) -> Plan:
    """Return which units go; the model stays as it is.

    Args:
        model: the dense model.
        groups: from `discover`.
        scores: from `score`: their criterion and text win over the settings'; None to estimate as
            the settings say.
        settings: how much, where from, such as ``presets.paper(ratio=0.2)``.

    Raises:
        UserError: the settings cannot be met, and what can.
    """
    model.require_dense()
    said, text, estimate = settings.written(), None, None
    if scores is not None:
        if settings.steps > 1:
            raise UserError("scores hold for one step; give None to estimate before each")
        how, text = scores.criterion, scores.text
        said = {name: of for name, of in said.items() if name not in READ_BY}
        said |= {name: getattr(how, name) for name in READ_BY if how.name in READ_BY[name]}
        said |= {"criterion": how.name, "seed": scores.seed}
        if text is not None:
            read = text.settings
            said |= {"calibration": read["source"]}
            said |= {name: read[name] for name in ("samples", "seq_len")}
            said |= {"seed": read["seed"]} if how.reads_text else {}
            said |= {name: read.get(name) for name in ("text_split", "text_field")}
        known = dict(scores)
        estimate = lambda *_: known  # noqa: E731
    said |= {"model": model.loaded.name, "out": _NEW, "dry_run": True}
    asked = PruneSettings(**said)
    loaded = replace(model.current, model=sharing_copy(model.network))
    run = PruneRun(asked, loaded=loaded, discovery=groups, text=text, estimate=estimate)
    run.check()
    run.load()
    run.make_plan()
    assert run.plan is not None
    return run.plan


def curve(
    model: Model,
    settings: PlanSettings | None = None,
    *,
    ratios: Sequence[float] | float = RATIOS,
    text: str | Path | None = None,
    measured_tokens: int = 8192,
) -> list[tuple[Plan, CurvePoint]]:
    """Return a plan and what it costs for each size; the model stays as it is.

    Args:
        model: the dense model.
        settings: how it is pruned, such as ``presets.balanced(calibration="c4")``; by default
            ``presets.balanced()``.
        ratios: shares of all parameters to remove.
        text: a corpus to measure on, as for `perplexity`; None for what calibration leaves of its
            source.
        measured_tokens: of it, at most.

    Raises:
        UserError: a size cannot be reached, or there is no text to measure on, or no tokenizer.
    """
    model.require_dense()
    said = {} if settings is None else settings.written()
    said = {name: of for name, of in said.items() if name in CurveSettings.model_fields}
    said |= {"model": model.loaded.name, "out": _NEW, "ratios": np.ravel(ratios).tolist()}
    said |= {"text": None if text is None else str(text), "measured_tokens": measured_tokens}
    asked = CurveSettings(**said)
    check_text(asked)
    model.current.require_tokenizer()
    run = CurveRun(asked, loaded=model.current, discovery=discover(model))
    for ratio in asked.ratios:
        run.reach(ratio)
    return [run.point(ratio) for ratio in asked.ratios]


def prune_(
    model: Model | LoadedModel | nn.Module,
    plan: Plan | Discovery,
    removal: Removal | None = None,
    *,
    verify: bool = True,
) -> Edits | None:
    """Remove units from a model in place.

    Either ``prune_(model, plan)``, or of any module ``prune_(module, discovery, removal)``, which
    returns what was changed. A `Model` keeps its dense weights until it was refitted or trained.

    Args:
        removal: group name -> units, in any collection, or a mask that is true for them.

    Raises:
        PlanError: the plan is for another model, or breaks its rules.
        InfeasibleError: the removal breaks them.
        UserError: a `Model` was pruned before.
        VerificationError: the result is not the masked model; it is undone.
    """
    if isinstance(model, Model):
        model.require_dense()
    if isinstance(plan, Discovery):
        made, groups, gone = None, plan, checked_removal(plan, removal or {})
    else:
        made, groups = plan, discover(model)
        gone = plan.removal(groups)
    if not isinstance(model, Model):
        return prune_module_(module_of(model), groups, gone, verify=verify)
    surgeon = Surgeon(model.network, verify, Clock())
    refitter = Refitter(model.current, groups, surgeon, model.loaded.stored_dtype)
    surgeon.cut(groups, gone)
    model.plan, model.groups, model._removed = made, groups, gone
    model._surgeon, model._refitter = surgeon, refitter
    return surgeon.edits if made is None else None


def refit_(model: Model, text: Calibration | ArrayLike) -> None:
    """Refit by least squares what reads the removed units, where held-out text says it is a gain.

    Args:
        model: pruned by `prune_`.
        text: from `calibration`, or token ids, shape (samples, seq_len); more samples are better
            than importance needs.

    Raises:
        UserError: it was not pruned, or was refitted or trained since.
    """
    if model._refitter is None:
        raise UserError("there is nothing to refit; prune the model and refit it before training")
    tokens = _tokens(text, model.network)
    model._refitter.refit(model._removed, *fitted_and_judged(tokens))
    model._refitter = None  # and with it the dense weights


def recover_(
    model: Model,
    data: str | Path,
    settings: TrainingSettings,
    *,
    teacher: Model | None = None,
    **trainer: Any,
) -> Outcome:
    """Train a model; it keeps its weights if held-out examples did not gain.

    Where they did, ``model.network`` is another module afterwards.

    Args:
        model: pruned or not.
        data: instructions, chats or text: a hub dataset or a file; ``self``: the teacher writes.
        settings: such as ``Lora(rank=8)``, or ``RecoverSettings``, which also has options of the
            data.
        teacher: the dense model, which writes ``self``.
        trainer: ``callbacks``, ``optimizer_cls_and_kwargs`` and others that transformers' Trainer
            takes, but no ``optimizers``: a copy of the model is trained.

    Raises:
        UserError: the data cannot be read, or does not do for the model, or there is no tokenizer.
    """
    # What trains is imported when it is used: other steps do without peft.
    from llm_pruner.commands.recover_start import (
        as_teacher,
        check_data,
        make_samples,
        read_examples,
    )
    from llm_pruner.recovery import recover_ as train_

    said = {"model": model.loaded.name, "out": _NEW, "data": (str(data),)}
    said |= {"teacher": None if teacher is None else teacher.loaded.name}
    asked = RecoverSettings(**settings.written() | said)
    if PRUNED in asked.data:
        raise UserError("data 'pruned' is for the command recover; give other data here")
    check_data(asked)
    model.current.require_tokenizer()
    check_trains(str(model.network.device))
    check_length(model.network, asked.seq_len)
    if asked.bf16 is None:
        fast = multiplies_bfloat16(model.network.device.type)
        asked = asked.with_trainer(bf16=fast and model.network.dtype == torch.float32)
    dense = None if teacher is None else as_teacher(teacher.current, model.current)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        samples = make_samples(asked, work, model.current, dense, read_examples(asked))
        network, outcome = train_(
            own_copy(model.network),
            [one for each in samples for one in each.train],
            [one for each in samples for one in each.held_out],
            asked,
            work=work,
            keeps=False,
            as_saved_=partial(round_, dtype=model.loaded.stored_dtype),
            **trainer,
        )
    if outcome.gained:
        # Nothing is to hold the network before, or the dense one, which the refitter has.
        model.network, model._refitter = network, None
        model.loaded = model.current
        if model._surgeon is not None:
            model._surgeon.model = network
    return outcome


def health(model: Model, prompts: Sequence[str] | None = None) -> Health:
    """Return how many of the model's long answers loop, and how many never end.

    Args:
        prompts: put as a user's message where there is a chat template; None for those of
            ``evaluate --health``.
    """
    texts = own_prompts() if prompts is None else (*prompts,)
    asked = health_prompts(texts, None)
    name = "built in" if prompts is None else "given"
    model.current.require_tokenizer()
    answers = written(asked, lambda: model.current)
    return measure_health(name, asked, answers, dtype_name(model.network))


def perplexity(
    model: Model,
    source: str | Path,
    *,
    protocol: Protocol = "standard",
    seq_len: int | None = None,
    max_tokens: int | None = None,
) -> PerplexityResult:
    """Return the perplexity on a corpus: wikitext2, ptb, c4, another hub dataset or a file.

    Raises:
        UserError: the corpus cannot be read, or there is no tokenizer to read it with.
    """
    tokenizer = model.current.require_tokenizer()
    asked = PerplexitySettings(protocol=protocol, seq_len=seq_len, max_tokens=max_tokens)
    text = load_evaluation_text(str(source), asked)
    return measure_perplexity(model.network, tokenizer, text, asked)
