"""Speed of models in a server, such as vLLM or llama.cpp, beside what their sizes allow."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_pruner.checkpoints.quantizer import QUANT_METHOD
from llm_pruner.checkpoints.remote_code import CODE
from llm_pruner.commands.bench import (
    Bench,
    Figures,
    Served,
    check_length,
    compared,
    counted,
    together,
)
from llm_pruner.commands.export import export
from llm_pruner.discovery.groups import discover
from llm_pruner.errors import UserError
from llm_pruner.evaluation import footprint, serving
from llm_pruner.evaluation.speed import Speed
from llm_pruner.files.disk import expanded
from llm_pruner.hook import has_recipe
from llm_pruner.models.load import LoadedModel, load
from llm_pruner.models.stored import stored_at, weight_names
from llm_pruner.planning.rounding import undivided
from llm_pruner.runtime.memory import give_back
from llm_pruner.settings.common import ModelSettings
from llm_pruner.settings.evaluate import BenchSettings
from llm_pruner.settings.export import ExportSettings
from llm_pruner.settings.registry import entry

_TYPE = "f16"
"""Of exported weights, where none is given."""


@dataclass(frozen=True)
class _Subject:
    """A model that is to be served.

    Attributes:
        path: what the server reads, a folder or a file; None for a file that is yet to be made.
        prefill_macs: of a prompt; None if they are not known.
    """

    source: ModelSettings
    figures: Figures
    path: Path | None
    kind: str
    vocabulary: int
    prefill_macs: int | None = None

    @property
    def bytes(self) -> int:
        assert self.path is not None
        folder = self.path.is_dir()
        files = [self.path / name for name in weight_names(self.path)] if folder else [self.path]
        return sum(file.stat().st_size for file in files)


def bench_servers(settings: BenchSettings) -> Bench:
    """Start a server for each model, time them in turns on the same requests, and end them.

    Raises UserError if it is not here or does not run a model, LLMPrunerError if it fails.
    """
    if not hasattr(os, "killpg"):
        raise UserError(
            "--server ends a server, and all that it started, in a way that Windows does not have; "
            "use Linux or macOS, or leave --server out, to time the model in this process"
        )
    server = entry("evaluation/servers", str(settings.server))
    start = server.find(settings.server_python)
    if server.FORMAT is not None:
        entry("export/formats", server.FORMAT).require(settings.type or _TYPE, None)
        if "dtype" in settings.given:
            raise UserError(
                f"--dtype {settings.dtype} is about folders that are read as they are, and for "
                f"{server.TITLE} they are exported; use --type"
            )
    against = [] if settings.against is None else [settings.against]
    exported = server.FORMAT is not None and not all(
        _is_file(name, server) for name in (settings.model, *against)
    )
    if settings.type is not None and not exported:
        what = "folders" if server.FORMAT is None else "such files"
        raise UserError(
            f"--type is about files that are exported, and {server.TITLE} reads {what} as they "
            "are; leave it out"
        )
    subjects = [_subject(settings, name, server) for name in (None, *against)]
    give_back()
    with tempfile.TemporaryDirectory(prefix="llm-pruner-") as scratch, ExitStack() as stack:
        subjects = [
            one if one.path else replace(one, path=_exported(one, server.FORMAT, out))
            for one, out in zip(subjects, (Path(scratch) / name for name in "ab"), strict=False)
        ]
        running = [
            stack.enter_context(_running(settings, server, start, subjects, number, Path(scratch)))
            for number in range(len(subjects))
        ]
        speeds = [
            serving.measure_servers(
                running,
                min(one.vocabulary for one in subjects),
                batch_size=size,
                **settings.model_dump(include={"prompt_tokens", "new_tokens", "repeats"}),
            )
            for size in settings.batch_size
        ]
        by_model = zip(*speeds, strict=True)
        figures = [_measured(*each) for each in zip(subjects, running, by_model, strict=True)]
        limits = _prefill_limit(subjects), subjects[-1].bytes / subjects[0].bytes
        pairs = [(each[0], each[1]) for each in speeds if len(each) > 1]
    return together(
        settings,
        figures,
        [compared(*pair, *limits) for pair in pairs],
        server=server.TITLE,
        server_args=settings.server_args,
        dtype=" against ".join(dict.fromkeys(one.kind for one in subjects)),
    )


def _subject(settings: BenchSettings, other: str | None, server: Any) -> _Subject:
    """Return MODEL, or the other one, which is refused if the server does not run it."""
    source = settings.loading(other, _dtype(settings))
    if _is_file(source.model, server):
        file = expanded(source.model)
        parameters, vocabulary, kind = server.counted(file)
        known = Figures(file.stem, parameters, bytes_on_disk=file.stat().st_size)
        return _Subject(source, known, file, kind, vocabulary)
    loaded = load(source, tokenizer_required=False, weights=False)
    check_length(loaded, settings)
    folder = stored_at(source.model, loaded.revision or source.revision)
    if server.FORMAT is None:
        _check_folder(settings, loaded, folder, server)
    return _Subject(
        source,
        counted(loaded, source),
        path=folder if server.FORMAT is None else None,
        kind=source.dtype if server.FORMAT is None else settings.type or _TYPE,
        vocabulary=loaded.model.get_input_embeddings().weight.shape[0],
        prefill_macs=footprint.count_work(
            loaded.model, prompt_tokens=settings.prompt_tokens
        ).prefill_macs,
    )


def _is_file(model: str, server: Any) -> bool:
    """Whether a model is a file that the server reads as it is."""
    return server.FORMAT is not None and expanded(model).suffix == f".{server.FORMAT}"


def _check_folder(
    settings: BenchSettings, loaded: LoadedModel, folder: Path | None, server: Any
) -> None:
    """Raise UserError unless a server runs a folder as it is."""
    if folder is None or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{loaded.name} is no folder with weights on this machine, which is what "
            f"{server.TITLE} reads; name one, or use --server llama.cpp"
        )
    config, code = loaded.model.config, folder / f"{CODE}.py"
    written = code.read_text("utf-8", "replace") if code.is_file() else None
    try:
        server.how(loaded.model, config, _saved_as(config), written)
    except UserError as error:
        raise UserError(
            f"{loaded.name} does not run in {server.TITLE}: {error}; or leave out --server, to "
            "time it in this process"
        ) from error
    if has_recipe(config) and not settings.trust_remote_code:
        raise UserError(
            f"{loaded.name} holds code that {server.TITLE} runs, {CODE}.py; read it, and add "
            "--trust-remote-code if it may"
        )
    devices = server.devices(settings.server_words)
    if devices > 1 and (group := undivided(discover(loaded.model).groups, devices)):
        raise UserError(
            f"{group.name} of {loaded.name} has {group.size} units, which {devices} devices cannot "
            f"share; prune with --round-to tp{devices}, or ask for fewer devices in --server-args"
        )


def _dtype(settings: BenchSettings) -> str:
    """Return the type that a server is told; by default the server chooses."""
    return settings.dtype if "dtype" in settings.given else "auto"


def _saved_as(config: Any) -> str:
    quantized = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantized, dict):
        quantized = quantized.to_dict()
    if quantized.get("quant_method") == QUANT_METHOD:
        return "recipe"
    return "remote_code" if has_recipe(config) else "stock"


def _exported(subject: _Subject, form: str, out: Path) -> Path:
    of = subject.source.model_dump(include={"model", "revision", "trust_remote_code"})
    file = out.with_suffix(f".{form}")
    return export(ExportSettings(to=form, type=subject.kind, out=file, **of)).path


def _running(
    settings: BenchSettings,
    server: Any,
    start: Sequence[str],
    subjects: Sequence[_Subject],
    number: int,
    scratch: Path,
) -> AbstractContextManager[serving.Server]:
    """Return what starts the server of one model."""
    cache = max(one.figures.kv_cache_bytes_per_token or 0 for one in subjects)
    wanted = serving.Wanted(
        port=serving.free_port(),
        tokens=settings.prompt_tokens + settings.new_tokens,
        texts=max(settings.batch_size),
        dtype=_dtype(settings),
        cache_bytes_per_token=cache,
        servers=len(subjects),
        trust_remote_code=settings.trust_remote_code,
        more=settings.server_words,
    )
    command = server.command(start, subjects[number].path, wanted)
    log = scratch / f"{number}.log"
    return serving.serving(server.TITLE, command, wanted.port, log)


def _measured(subject: _Subject, server: serving.Server, speeds: tuple[Speed, ...]) -> Figures:
    served = Served(subject.bytes, server.peak_bytes(), server.seconds)
    return replace(subject.figures, speed=speeds, served=served)


def _prefill_limit(subjects: Sequence[_Subject]) -> float | None:
    small, large = subjects[0].prefill_macs, subjects[-1].prefill_macs
    return large / small if small and large else None
