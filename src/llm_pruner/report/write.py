"""A report as a page and as a model card, written after a run and again after a measurement."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llm_pruner.errors import UserError
from llm_pruner.files.disk import expanded
from llm_pruner.files.outputs import rewrite
from llm_pruner.report import data, figures, view
from llm_pruner.report.facts import against, dense_evaluation, evaluation_of
from llm_pruner.report.records import Measured
from llm_pruner.report.text import at_home, fenced, markdown, number, said, visible
from llm_pruner.settings.options import Settings

_LOG = logging.getLogger(__name__)


def write_report(folder: Path, make: Callable[[], data.Report]) -> None:
    """Write page, data and model card of a report that is made here, see ``write_drawn``."""
    write_drawn(folder, lambda: files(make()), "the checkpoint")


def write_drawn(folder: Path, draw: Callable[[], dict[str, str]], rest: str) -> None:
    """Write drawn files, name -> content, into a folder; a failure warns, and keeps ``rest``."""
    try:
        written = draw()
    except Exception as error:  # whatever a drawing library may raise
        warnings.warn(
            f"no report was written ({type(error).__name__}: {error}); {rest} is complete",
            stacklevel=3,
        )
        return
    rewrite(folder, written)


def add_evaluation(folder: Path, found: Measured, model: str) -> None:
    """Add what was measured of one model to the report of a folder, and draw it anew.

    A model card that was edited stays. Raises UserError if there is no report of ``model``.
    """
    report = data.report_in(folder)
    variant = _variant_of(folder, report, model, found.parameters)
    source = report.source.name
    if variant == "dense" and found.model != source:
        _LOG.warning(f"{found.model} has the size of {source} and stands in its report as it")
    report = report.with_evaluation(variant, evaluation_of(found))
    if (dense := dense_evaluation(found, report)) is not None:
        report = report.with_evaluation("dense", dense)
    elif other := against(found):
        _LOG.warning(
            f"what was measured of {other} is no part of the report: it is not the {source} "
            "that the model was made of, or its weights differ"
        )
    card = folder / data.CARD_FILE
    ours = not card.exists() or digest(card.read_text("utf-8", "replace")) == report.card_digest
    rewrite(folder, files(report, card=ours))


def write_request(folder: Path, settings: Settings) -> None:
    """Write beside the weights what was asked for, as a file that ``--config`` reads.

    The home folder is written as ``~``, since checkpoints are published.
    """
    kept = {name: of for name, of in settings.written().items() if name not in _ANEW}
    said = yaml.safe_dump(_at_home(kept), sort_keys=False, allow_unicode=True)
    rewrite(folder, {REQUEST_FILE: said})


def _at_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _at_home(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return at_home(value) if isinstance(value, str) else value


def page_in(folder: Path) -> Path | None:
    """Return the page in a folder; None if none could be drawn."""
    page = folder / data.HTML_FILE
    return page if page.is_file() else None


def check_measured(folder: Path, model: str, parameters: int) -> None:
    """Raise UserError if a folder's report is not about a model of so many parameters."""
    _variant_of(folder, data.report_in(folder), model, parameters)


def _variant_of(folder: Path, report: data.Report, model: str, parameters: int) -> data.Variant:
    if expanded(model).exists() and expanded(model).resolve() == folder.resolve():
        return report.final
    dense = report.sizes.get("dense")
    if dense is not None and dense.total == parameters:
        return "dense"
    raise UserError(
        f"{model} has {parameters:,} parameters and is neither the model in {folder} nor "
        f"{report.source.name}, of which it was made; name one of the two, or leave --report out"
    )


REQUEST_FILE = "request.yaml"
"""What a run was asked for."""

_ANEW = ("restart", "resume", "overwrite")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")


def files(report: data.Report, *, card: bool = True) -> dict[str, str]:
    """Return the files of a report: name -> content; without ``card``, not the model card."""
    written = {}
    if card:
        text = render_card(report)
        report = report.model_copy(update={"card_digest": digest(text)})
        written[data.CARD_FILE] = text
    # The data comes last: what was drawn can be drawn again from it.
    return {**written, data.HTML_FILE: render_html(report), data.JSON_FILE: report.to_json()}


def digest(text: str) -> str:
    """Return the SHA-256 of a text, by which a model card that was edited is told apart."""
    return hashlib.sha256(text.encode()).hexdigest()


def render_html(report: data.Report) -> str:
    """Return one page that needs nothing else: no script, no font, no request."""
    return page("report.html", title=view.title(report), report=report, plots=_plots(report))


def render_card(report: data.Report) -> str:
    """Return a model card in Markdown, with metadata that the hub understands."""
    template = _environment(False).get_template("card.md")
    text = template.render(metadata=_metadata(report), report=report)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _metadata(report: data.Report) -> str:
    from huggingface_hub import ModelCardData

    def known(pattern: re.Pattern[str], name: str | None) -> str | None:
        return name if name is not None and pattern.fullmatch(name) else None

    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llm-pruner", *(("pruned", "structural-pruning") if report.was_pruned else ())],
        base_model=known(_HUB_ID, report.source.hub_id),
        license=known(_LICENSE, report.source.license),
    )
    return yaml.safe_dump(card.to_dict(), sort_keys=True)


def page(template: str, **context: Any) -> str:
    """Return a page from a template."""
    return _environment(True).get_template(template).render(**context)


def _plots(report: data.Report) -> dict[str, Markup]:
    drawn = dict.fromkeys(("widths", "importance", "loss"), Markup(""))
    layers, units = view.decoder_layers(report), view.changed_units(report)
    if layers and units:
        headings = [(name, view.unit(name, report)) for name in units]
        drawn["widths"] = figures.widths(layers, headings)
    if maps := [found for found in report.importance if found.rows]:
        drawn["importance"] = figures.heat(maps, [view.unit(found.kind, report) for found in maps])
    if report.recovery is not None and report.recovery.loss:
        drawn["loss"] = figures.loss(report.recovery.loss)
    return drawn


@cache
def _environment(html: bool) -> Environment:
    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) else visible(value)

    made = Environment(
        loader=PackageLoader("llm_pruner.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=shown if html else None,
    )
    made.filters |= {"md": markdown, "fenced": fenced, "number": number, "said": said}
    made.globals["view"] = view
    if html:
        source = made.loader.get_source(made, "style.css")[0]  # type: ignore[union-attr]
        made.globals["style"] = Markup(source)
    return made
