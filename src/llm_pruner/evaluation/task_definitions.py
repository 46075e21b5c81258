"""Tasks as the installed lm-evaluation-harness defines them, with local data in place of the hub.

Nothing of a definition is written here: prompts, answers and metrics come from the harness's own
files, so they are those of whatever version is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_pruner.errors import LLMPrunerError, UserError

_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
"""Where the harness keeps the seven tasks; its index of all tasks takes ten seconds to build."""

_DATA = ("dataset_path", "dataset_name", "dataset_kwargs", "tag")
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")

READER = "offline_data"
"""Name of the module that is written beside task files."""

READER_SOURCE = '''\
"""Reads the records beside this file; written by llm-pruner."""

import json
from pathlib import Path

import datasets


def load(local_file, local_split, **_):
    """Return the records of a file as the only split."""
    path = Path(__file__).parent / local_file
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return {local_split: datasets.Dataset.from_list(records)}
'''


def require_harness() -> None:
    """Raise UserError if lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "zero-shot tasks are run by lm-evaluation-harness, which is not installed; "
            "run: pip install 'llm-pruner[eval]'"
        )


def definition_file(task: str) -> Path | None:
    """Return the harness's file that defines one of the seven tasks; None for any other task."""
    file = _tasks_folder() / _FILES[task] if task in _FILES else None
    return file if file is not None and file.is_file() else None


def local_definition(task: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the harness's definition of a task, for these records in place of its dataset.

    Raises:
        LLMPrunerError: the installed harness does not define the task where it used to.
    """
    from datasets import Dataset

    definition, split = _without_data(task, resolve=True)

    def load(**_: Any) -> dict[str, Dataset]:
        return {split: Dataset.from_list([dict(record) for record in records])}

    return definition | {"custom_dataset": load}


def definition_text(task: str, records_file: str) -> str:
    """Return the same definition as YAML; it reads ``records_file`` beside it with ``READER``.

    Raises:
        LLMPrunerError: the installed harness does not define the task where it used to.
    """
    import yaml

    definition, split = _without_data(task, resolve=False)
    definition["custom_dataset"] = _Function(f"{READER}.load")
    definition["dataset_kwargs"] = {"local_file": records_file, "local_split": split}
    return yaml.dump(definition, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=100)


def _without_data(task: str, *, resolve: bool) -> tuple[dict[str, Any], str]:
    """Return a definition without its dataset, and the name of the split that is evaluated."""
    from lm_eval.tasks._yaml_loader import load_yaml

    file = definition_file(task)
    if file is None:
        raise LLMPrunerError(
            f"the installed lm-eval has no {_FILES[task]}, which defines {task}; "
            "install the version that llm-pruner asks for: pip install 'llm-pruner[eval]'"
        )
    definition = load_yaml(file, resolve_func=resolve)
    split = definition.get("test_split") or definition["validation_split"]
    kept = {key: value for key, value in definition.items() if key not in (*_DATA, *_SPLITS)}
    kept["test_split" if definition.get("test_split") else "validation_split"] = split
    if not resolve:
        kept = {key: _as_function(value) for key, value in kept.items()}
    return kept, split


class _Function(str):
    """A dotted name that YAML marks with ``!function``."""

    __slots__ = ()


def _as_function(value: Any) -> Any:
    """Turn a path into the harness, which its loader makes of ``!function``, into a module name."""
    folder = f"{_tasks_folder()}/"
    if isinstance(value, str) and value.startswith(folder):
        return _Function("lm_eval.tasks." + value.removeprefix(folder).replace("/", "."))
    return value


def _dumper() -> type[Any]:
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(
        _Function, lambda dumper, value: dumper.represent_scalar("!function", str(value))
    )
    return Dumper


def _tasks_folder() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("lm-evaluation-harness is not installed")
    return Path(spec.origin).parent / "tasks"
