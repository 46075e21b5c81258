"""Commands made of settings: each field is an option, and its declaration the help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from llm_pruner.cli.output import check_json
from llm_pruner.errors import UserError
from llm_pruner.settings.common import once, pairs
from llm_pruner.settings.options import Option, Settings, kinds_of, option_name, option_of

_S = TypeVar("_S", bound=Settings)

Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the results for scripts; - for stdout.",
        show_default=False,
    ),
]
"""The option that every command has."""


class GroupedCommand(TyperCommand):
    """A command whose help lists each option under its ``rich_help_panel``, as plain text."""

    kind: type[Settings] | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual; raise UserError for an earlier option, with what to write now."""
        known = {flag for param in self.params for flag in (*param.opts, *param.secondary_opts)}
        for at, word in enumerate(args):
            flag, sign, value = word.partition("=")
            if self.kind and flag.startswith("--") and flag not in known:
                now = _instead(self.kind, flag, value if sign else "".join(args[at + 1 : at + 2]))
                if now is not None:
                    raise UserError(now)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section per heading, in the order in which the headings first occur."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            heading = getattr(param, "rich_help_panel", None) or usual
            sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def add(
    app: typer.Typer,
    name: str,
    kind: type[_S],
    run: Callable[[_S, str | None], None],
    examples: str = "",
) -> None:
    """Add a command that reads its settings from options and from ``--config``.

    Args:
        app: gets the command.
        name: of the command.
        kind: what it can be asked for.
        run: is called with the settings and the file of ``--json``; its docstring is the help.
        examples: shown below the options.
    """
    shown = [
        inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=how)
        for field, how in _parameters(kind)
    ]

    def command(**values: Any) -> None:
        config, json, texts = values.pop("config"), values.pop("json"), values.pop("set") or []
        if "help" in texts:
            _list_settings(kind)
            return
        given = {field: value for field, value in values.items() if value not in (None, [])}
        settings = kind.read({**given, **kind.from_texts(texts)}, config and Path(config))
        check_json(json, getattr(settings, "out", getattr(settings, "report", None)))
        run(settings, json)

    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in shown}
    command.__doc__ = run.__doc__
    grouped = type("GroupedCommand", (GroupedCommand,), {"kind": kind})
    app.command(name, cls=grouped, epilog=examples)(command)


def _instead(kind: type[Settings], flag: str, value: str) -> str | None:
    """Return what to write in place of an earlier option, or None if there was none."""
    name = flag[2:].replace("-", "_")
    field = kind.model_fields.get(name.removeprefix("no_"))
    if field is not None and field.annotation in (bool, bool | None):
        value, name = str(not name.startswith("no_")).lower(), name.removeprefix("no_")
    return kind.renamed(name, value)


def setting_words(kind: type[Settings]) -> Iterator[tuple[str, str]]:
    """Yield the name and help of each field that has no option of its own."""
    preset, shown = kind.of_preset(None), kind.shown()
    for name, field in kind.model_fields.items():
        if name not in shown:
            yield name, _words(name, field, preset)


def _list_settings(kind: type[Settings]) -> None:
    print("Settings for --set KEY=VALUE and --config files:")
    for name, words in setting_words(kind):
        print(fill(words, 80, initial_indent=f"  {name:<16}  ", subsequent_indent=" " * 20))


def _parameters(kind: type[Settings]) -> list[tuple[str, Any]]:
    """Return (name, annotation for Typer) of the options, in the order of the help.

    All but switches come as text, which the settings read.
    """
    preset, shown, own = kind.of_preset(None), kind.shown(), inspect.get_annotations(kind)
    order = {panel: number for number, panel in enumerate(kind.panels)}
    parameters: list[tuple[str, Any]] = []
    for name in sorted(shown, key=lambda n: (order.get(str(shown[n].panel), -1), n not in own)):
        option, field = shown[name], kind.model_fields[name]
        words = _words(name, field, preset)
        if option.positional:
            how = typer.Argument(metavar=option.metavar, help=words)
            parameters.insert(0, (name, Annotated[str | None, how]))
            continue
        flags = [option_name(name), *filter(None, [option.short])]
        many = {once, pairs} & {getattr(one, "func", None) for one in kinds_of(field)[1]}
        shape: Any = list[str] if many else bool if field.annotation is bool else str
        parameters.append((name, _typed(shape, *flags, words=words, option=option)))
    return [
        *parameters,
        (
            "config",
            _typed(
                str,
                "--config",
                words="YAML file with options and settings; those beside it win.",
                option=Option("FILE"),
            ),
        ),
        ("json", Json),
        (
            "set",
            _typed(
                list[str],
                "--set",
                words="Set what has no option of its own, as often as needed; --set help lists it.",
                option=Option("KEY=VALUE"),
            ),
        ),
    ]


def _typed(shape: Any, *flags: str, words: str, option: Option) -> Any:
    how: dict[str, Any] = {"metavar": option.metavar, "help": words}
    how |= {"rich_help_panel": option.panel, "show_default": False}
    return Annotated[shape | None, typer.Option(*flags, **how)]


def _words(name: str, field: FieldInfo, preset: dict[str, Any]) -> str:
    words, shown = str(field.description), option_of(field).shown
    if field.is_required():
        return f"{words} [required]"
    value = preset.get(name, field.default) if shown is None else shown
    if isinstance(value, tuple | list):
        value = ",".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else "on" if value is True else str(value)
    return words if text in ("None", "False", "", "{}") else f"{words} [default: {text}]"
