"""What a model can do: zero-shot tasks, skills, long answers; what is known is not done again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import __version__ as transformers_version

from llm_pruner.data.files import read_skill, read_source, read_task
from llm_pruner.data.text import load_documents, with_field
from llm_pruner.evaluation import health, result_cache, skills, zero_shot
from llm_pruner.evaluation.answers import Asked, written
from llm_pruner.evaluation.programs import require_sandbox
from llm_pruner.models.load import LoadedModel, load, stored_dtype
from llm_pruner.report.records import Abilities, ZeroShot, as_json
from llm_pruner.settings.common import ModelSettings, TaskSettings
from llm_pruner.settings.evaluate import EvaluateSettings
from llm_pruner.version import __version__

if TYPE_CHECKING:
    from llm_pruner.evaluation.harness import LoadedLM, PreparedTask

HUMAN_EVAL = "openai/openai_humaneval"
_RESULTS = TypeAdapter(dict[Literal["results"], list[zero_shot.TaskResult]])


@dataclass
class Late:
    """A model that is loaded when it is first needed.

    Attributes:
        room: gives the bytes that the weights may take on a device.
        reads_text: whether it is refused without a tokenizer.
        identity: by which they are kept; None where nothing is.
    """

    settings: ModelSettings
    keeps: bool
    room: Callable[[str], int]
    reads_text: bool = True

    @cached_property
    def loaded(self) -> LoadedModel:
        how = {"packed": True, "tokenizer_required": self.reads_text}
        return load(self.settings, memory=self.room(self.settings.device), **how)

    @cached_property
    def dtype(self) -> str:
        """The type that it is computed in."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        return str(stored_dtype(self.settings, packed=True)).removeprefix("torch.")

    @property
    def is_loaded(self) -> bool:
        return "loaded" in vars(self)

    def unload(self) -> None:
        """Give up the model until it is needed again."""
        vars(self).pop("loaded", None)

    @cached_property
    def identity(self) -> result_cache.ModelIdentity | None:
        return result_cache.identify(self.settings) if self.keeps else None

    def key(self, **about: Any) -> str | None:
        """Return the name under which a result is kept; None where nothing is."""
        if self.identity is None:
            return None
        return result_cache.key(self.identity, self.settings, **about)

    @property
    def name(self) -> str:
        return self.loaded.name if self.identity is None else self.identity.name


@dataclass(frozen=True)
class Prepared:
    """What models are asked, read before one is loaded.

    Attributes:
        problems: of HumanEval, those that are put to the model.
        total: problems that there are.
        prompts: of long answers; ``prompts_name`` says whose they are.
        sums: GSM8K as lm-evaluation-harness runs it.
    """

    tasks: list[PreparedTask] | None = None
    sums: PreparedTask | None = None
    problems: tuple[Mapping[str, str], ...] = ()
    total: int = 0
    prompts: Asked | None = None
    prompts_name: str = "built in"


def prepare(settings: EvaluateSettings) -> Prepared:
    """Read what is asked for; raise UserError for what cannot be read or run."""
    named, data, limit = settings.skills or (), settings.skills_data, settings.limit
    tasks = None if settings.tasks is None else prepare_tasks(settings)
    sums, prompts, name = None, None, "built in"
    problems = _problems(data) if "humaneval" in named else []
    if "gsm8k" in named:
        zero_shot.require_harness()
        from llm_pruner.evaluation.harness import prepare as prepare_task

        records = None if data is None else read_skill(data, "gsm8k")
        sums = prepare_task(skills.GSM8K_TASK, records, limit)
    if settings.health:
        said = health.own_prompts()
        if settings.health_prompts is not None:
            read = partial(load_documents, str(settings.health_prompts))
            documents = with_field(lambda name: read(text_field=name), settings.text_field)
            lines = (line.removesuffix("\n") for line in documents.records)
            name, said = documents.name, tuple(filter(str.strip, lines))
        prompts = health.health_prompts(said, limit)
    first = tuple(islice(problems, limit))
    return Prepared(tasks, sums, first, len(problems), prompts, name)


def _problems(data: Path | None) -> list[Mapping[str, str]]:
    require_sandbox()
    if data is not None:
        return [*read_skill(data, "humaneval")]
    return [*read_source(HUMAN_EVAL, split="test")[2]]


def abilities(settings: EvaluateSettings, prepared: Prepared, late: Late) -> Abilities:
    """Return what a model can do of what is asked for; it is loaded only for what is not known."""
    harness, dtype = _Harness(settings, late), late.dtype

    def answers(asked: Asked) -> Any:
        return written(asked, lambda: late.loaded, settings.sequences, late.key)

    tasks = None if prepared.tasks is None else run_tasks(prepared.tasks, settings, harness, dtype)
    found = []
    if prepared.problems:
        programs = answers(skills.human_eval_prompts(prepared.problems))
        found.append(skills.human_eval(prepared.problems, programs, prepared.total, dtype))
    if prepared.sums is not None:
        found.append(skills.gsm8k(harness.results(prepared.sums)[0], dtype))
    long = None
    if prepared.prompts is not None:
        asked = prepared.prompts
        long = health.health(prepared.prompts_name, asked, answers(asked), dtype)
    return Abilities(late.name, tasks, found, long)


def prepare_tasks(settings: TaskSettings) -> list[PreparedTask]:
    """Return the tasks with their documents; raise UserError if one is unknown or has no data."""
    tasks, data = tuple(dict.fromkeys(settings.tasks or ())), settings.tasks_data
    zero_shot.require_harness()
    from llm_pruner.evaluation.harness import prepare  # imports the harness, which takes seconds

    records = [None if data is None else read_task(data, task) for task in tasks]
    return [
        prepare(task, found, settings.limit) for task, found in zip(tasks, records, strict=True)
    ]


@dataclass
class _Harness:
    """Runs tasks that no earlier run has a result of; each is kept as soon as it is there."""

    settings: EvaluateSettings
    late: Late
    cached: list[str] = field(default_factory=list)

    @cached_property
    def lm(self) -> LoadedLM:
        from llm_pruner.evaluation.harness import LoadedLM

        loaded = self.late.loaded
        return LoadedLM(loaded.model, loaded.tokenizer, self.settings.sequences)

    def results(self, task: PreparedTask) -> list[zero_shot.TaskResult]:
        from llm_pruner.evaluation.harness import run

        key = self.late.key(task=task.identity, lm_eval=version("lm-eval"))
        found = stored(_RESULTS, key)
        if found:
            self.cached.append(task.name)
        else:
            found = {"results": run(self.lm, task, self.settings.limit)}
            if key is not None:
                result_cache.write(key, as_json(found))
        return found["results"]


def run_tasks(
    tasks: list[PreparedTask], settings: EvaluateSettings, harness: _Harness, dtype: str
) -> ZeroShot:
    """Return the results of tasks with what a reader needs to compare them."""
    results = [result for task in tasks for result in harness.results(task)]
    mean, without = zero_shot.means(results)
    return ZeroShot(
        tasks=results,
        mean=mean,
        mean_without_boolq=without,
        cached=[*harness.cached],
        data="harness" if settings.tasks_data is None else "local",
        limit=settings.limit,
        dtype=dtype,
        versions={
            "lm_eval": version("lm-eval"),
            "llm_pruner": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers_version,
        },
    )


def stored(kind: TypeAdapter[Any], key: str | None) -> Any:
    """Return what an earlier run stored; None if there is nothing that can be used."""
    try:
        return None if key is None else kind.validate_python(result_cache.read(key))
    except ValidationError:
        return None
