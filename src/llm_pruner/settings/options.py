"""How an option is declared: once, as a field of a settings class.

The command line, its help, ``--config`` files, presets, the header of a plan, the record of a run
and the Python API are all read from the fields. Settings come from four places; what is said later
wins:

    defaults of the fields < a preset < a file given with --config < options on the command line
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo

from llm_pruner.errors import UserError
from llm_pruner.files.disk import expanded

_S = TypeVar("_S", bound="Settings")

_SHARE = re.compile(r":\d*\.?\d+$")
"""What a text of a mixture may end in."""


@dataclass(frozen=True)
class Option:
    """How a field is shown on the command line.

    Attributes:
        metavar: stands for the value in the help; None for a switch.
        shown: words that stand for the default in the help; None for the default itself.
        short: a letter with its dash.
        known: the words that it takes, where they are not in its type.
        reads: whether it names what is read: a model, a corpus, a file.
        positional: an argument, without dashes.
        hidden: has no option of its own: it is set by ``--set``, ``--config`` or Python.
    """

    metavar: str | None = None
    panel: str | None = None
    shown: str | None = None
    short: str | None = None
    known: tuple[str, ...] = ()
    reads: bool = False
    positional: bool = False
    hidden: bool = False


def option(default: Any, words: str, metavar: str | None = None, **how: Any) -> Any:
    """Declare an option: a field with its default, ``...`` for none, and words of its help.

    ``metavar`` and ``how`` are attributes of `Option`.
    """
    shown: Any = {"option": Option(metavar, **how)}
    return Field(default, description=words, json_schema_extra=shown)


def written(parse: Callable[[str], Any], *words: str) -> BeforeValidator:
    """Return a validator of a field that reads text, other than these words, with ``parse``."""
    return BeforeValidator(lambda v: parse(v) if isinstance(v, str) and v not in words else v)


class Settings(BaseModel):
    """What a user asks for. Frozen; a name that is not a field is refused with a near one.

    Classes of settings are put together by inheritance: what a command takes is all that its parts
    take, and can be given wherever one of the parts is asked for.

    Attributes:
        presets: name -> YAML file with values for some of the fields.
        default_preset: the one that holds where none is named.
        panels: headings of the help, in their order.
        hides: inherited fields that have no option of their own in this command.
        gone: earlier fields -> what to write now, in which ``{value}`` stands for the value.
        one_of: fields of which one stands for all: given as an option, it wins over any in a file.
        given: the fields that were given by name, not by a preset or default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    presets: ClassVar[Mapping[str, Path]] = {}
    default_preset: ClassVar[str | None] = None
    panels: ClassVar[tuple[str, ...]] = ()
    hides: ClassVar[frozenset[str]] = frozenset()
    gone: ClassVar[Mapping[str, str]] = {}
    one_of: ClassVar[frozenset[str]] = frozenset()
    _given: frozenset[str] = PrivateAttr(default=frozenset())

    def __init__(self, **values: Any) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        preset = self.beside(self.of_preset(values.get("preset")), values)
        try:
            super().__init__(**{**preset, **values})
        except ValidationError as error:
            raise UserError(_problem(type(self), error)) from None
        self._given = frozenset(values)
        for name, field in type(self).model_fields.items():
            known = option_of(field).known
            if known and getattr(self, name) not in (*known, field.default):
                raise UserError(_unknown(name, getattr(self, name), known))

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """Say where ``~`` is, as which a request has the home folder; a shell does so itself."""
        at_home = isinstance(value, Path) and value.parts[:1] == ("~",)
        return Path.home().joinpath(*value.parts[1:]) if at_home else value

    @property
    def given(self) -> frozenset[str]:
        return self._given

    @property
    def reads(self) -> list[str]:
        """Models, corpora and files that are read; lists with commas whole and in parts."""
        found: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name) if option_of(field).reads else None
            for one in value if isinstance(value, tuple) else (value,):
                # A preset that the package ships is no file of the user's.
                if one is not None and (name != "preset" or Path(str(one)).suffix):
                    parts = str(one).split(",")
                    found += [str(one), *parts, *(_SHARE.sub("", part) for part in parts)]
        return list(dict.fromkeys(found))

    @classmethod
    def beside(cls, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return what of a preset, and of the defaults, holds beside what was given."""
        del given
        return preset

    @classmethod
    def read(cls: type[_S], given: Mapping[str, Any], config: Path | None = None) -> _S:
        """Return a command's settings; options win over a YAML file. UserError if one is wrong."""
        filed = {} if config is None else read_yaml(config, f"--config {config}", cls)
        gone = cls.replaced(given, filed)
        return cls(**{**{name: of for name, of in filed.items() if name not in gone}, **given})

    @classmethod
    def shown(cls) -> dict[str, Option]:
        """Return the fields that have an option of their own."""
        found = {name: option_of(field) for name, field in cls.model_fields.items()}
        return {
            name: how for name, how in found.items() if not how.hidden and name not in cls.hides
        }

    @classmethod
    def renamed(cls, name: str, value: object) -> str | None:
        """Return what to write in place of an earlier option, or None if there was none."""
        if name in cls.gone:
            return f"{option_name(name)} went: {cls.gone[name].format(value=value)}"
        if name in cls.model_fields and name not in cls.shown():
            return f"{option_name(name)} is a setting now: write --set {name}={value}"
        return None

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> dict[str, Any]:
        """Return the fields of ``KEY=VALUE`` texts; UserError if one is malformed or unknown."""
        found: dict[str, Any] = {}
        for text in texts:
            key, sign, value = text.partition("=")
            name = key.strip().replace("-", "_")
            if not sign:
                raise UserError(f"--set {text} has no value; write KEY=VALUE")
            if name not in cls.model_fields:
                raise UserError(cls.unknown(f"--set {text}", name, value))
            found[name] = value
            field = cls.model_fields[name]
            if not _reads_text(field):
                try:
                    found[name] = yaml.safe_load(value)
                except yaml.YAMLError:
                    raise UserError(f"--set {text}: {value} is not YAML; correct it") from None
        return found

    @classmethod
    def unknown(cls, where: str, name: str, value: object) -> str:
        """Say that a name is no setting, and which one is near or took its place."""
        if name in cls.gone:
            return f"{where}: {name} went: {cls.gone[name].format(value=value)}"
        known = ", ".join(cls.model_fields)
        hint = near(name, cls.model_fields).strip() or f"known are {known}"
        return f"{where}: {name} is no setting; {hint}"

    @classmethod
    def replaced(cls, given: Mapping[str, Any], filed: Mapping[str, Any]) -> Collection[str]:
        """Return the fields of which a file's values make way for what was given as options."""
        del filed
        return cls.one_of if given.keys() & cls.one_of else ()

    @classmethod
    def of_preset(cls, name: str | None) -> dict[str, Any]:
        """Return the fields that a preset sets: by its name, or by the path of a YAML file."""
        name = name or cls.default_preset
        if name is None or not cls.presets:
            return {}
        if not isinstance(name, str | Path):
            raise UserError(f"--preset {name} is no name; use {', '.join(cls.presets)}, or a file")
        file = cls.presets.get(name, expanded(name))
        if not file.is_file():
            raise UserError(
                f"no preset {name!r}; {near(name, cls.presets)}known are {', '.join(cls.presets)}, "
                "or give a YAML file"
            )
        said = read_yaml(file, f"preset {name}", cls)
        if (other := said.get("preset")) is not None:
            raise UserError(
                f"preset {name} names another preset, {other}; give that as --preset and this file "
                "as --config"
            )
        return {**said, "preset": name}

    def but(self: _S, **changes: Any) -> _S:
        """Return the same settings with other values, which are checked; None for a default."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        changed = type(self)(**{**values, **changes})
        fields = type(self).model_fields
        cleared = {name: fields[name].default for name, of in changes.items() if of is None}
        changed = changed.model_copy(update=cleared)  # whatever a preset says
        changed._given = self._given | changes.keys()
        return changed

    def written(self) -> dict[str, Any]:
        """Return plain values of which the same settings come: what was given, and the preset.

        What was given stands even if it is the default of its field: a preset may say otherwise.
        What a preset says is not written: it would count as given.
        """
        said = self._given | {"preset"} if self.presets else self._given
        return self.model_dump(mode="json", include=set(said), exclude_none=True)


def presets_in(folder: str) -> dict[str, Path]:
    """Return the presets that lie in a folder beside this file: name -> YAML file."""
    found = sorted((Path(__file__).parent / folder).glob("*.yaml"))
    return {file.stem: file for file in found}


def option_of(field: FieldInfo) -> Option:
    """Return how a field is shown."""
    extra = field.json_schema_extra
    return extra.get("option", Option()) if isinstance(extra, Mapping) else Option()  # type: ignore[return-value]


def _reads_text(field: FieldInfo) -> bool:
    """Whether a field takes text as it is: others take what YAML makes of it."""
    kinds: list[Any] = [field.annotation]
    found: list[Any] = [*field.metadata]
    while kinds:
        kind = kinds.pop()
        if get_origin(kind) is Annotated:
            found += kind.__metadata__
            kinds.append(kind.__origin__)
        elif get_origin(kind) in (Union, types.UnionType):
            kinds += get_args(kind)
        elif kind in (str, Path):
            return True
    return any(isinstance(one, BeforeValidator) for one in found)


def option_name(name: str) -> str:
    """Return how the option of a field is written."""
    return "--" + name.rstrip("_").replace("_", "-")


def choices(annotation: Any) -> tuple[str, ...]:
    """Return the words that a type allows, those of a Literal or of one in a union."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(word for one in get_args(annotation) for word in choices(one))
    return ()


def near(name: str, known: Any) -> str:
    """Return "did you mean ...? " if a known name is near, else nothing."""
    close = difflib.get_close_matches(name, [str(one) for one in known], n=1)
    return f"did you mean {close[0]}? " if close else ""


def read_yaml(file: Path, what: str, kind: type[Settings]) -> dict[str, Any]:
    """Return the settings in a YAML file; UserError for what is no field of ``kind``."""
    try:
        text = expanded(file).read_text(encoding="utf-8")
        data, written = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read as UTF-8 text; give a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{what} is not YAML{where}; correct it there") from error
    except ValueError as error:  # of a date that there is not, as YAML reads 2024-02-30
        raise UserError(f"{what} is not YAML ({error}); correct it, or quote it") from error
    if not isinstance(data, dict):
        raise UserError(f"{what} holds no settings; write lines such as 'criterion: fisher'")
    unknown = [str(name) for name in data if name not in kind.model_fields]
    if unknown:
        raise UserError(kind.unknown(what, unknown[0], data.get(unknown[0])))
    assert isinstance(written, yaml.MappingNode)
    names = [str(key.value) for key, _ in written.value]
    for twice in (name for name in names if names.count(name) > 1):
        raise UserError(f"{what} says {twice} {names.count(twice)} times; leave one of them")
    return {str(name): value for name, value in data.items()}


def _unknown(name: str, value: object, known: Sequence[str]) -> str:
    words = near(str(value), known)
    return f"{option_name(name)} {value} is unknown; {words}use one of {', '.join(known)}"


def _missing(options: Mapping[str, Option]) -> str:
    """Say what has to be given, arguments first."""
    wanted = {}
    for name in sorted(options, key=lambda name: not options[name].positional):
        how, flag = options[name], option_name(name)
        if how.positional:
            wanted[str(how.metavar)] = "name one"
        else:
            wanted[flag] = f"add {flag} {how.metavar}"
    return f"no {' and no '.join(wanted)} given; {' and '.join(wanted.values())}"


def _problem(kind: type[Settings], error: ValidationError) -> str:
    """Say in one line what is wrong with the first field, and how many more there are."""
    first, *more = error.errors()
    name = str(first["loc"][0]) if first["loc"] else "settings"
    shown = option_name(name)
    if first["type"] == "extra_forbidden":
        return kind.unknown(kind.__name__, name, first["input"])
    if first["type"] == "missing":
        lacking = [str(one["loc"][0]) for one in (first, *more) if one["type"] == "missing"]
        return _missing({name: option_of(kind.model_fields[name]) for name in lacking})
    words = choices(kind.model_fields[name].annotation) if name in kind.model_fields else ()
    value = str(first["input"])[:60]
    if words:
        return _unknown(name, value, words)
    text = first["msg"].removeprefix("Value error, ")
    tail = f" (and {len(more)} more)" if more else ""
    return f"{shown} {value}: {text[:1].lower()}{text[1:]}{tail}; correct it"
