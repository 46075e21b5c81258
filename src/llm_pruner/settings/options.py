"""How an option is declared: once, as a field of a settings class.

The command line, its help, ``--config`` files, presets, the header of a plan, the record of a run
and the Python API are all read from the fields. Settings come from four places; later ones win:

    defaults of the fields < a preset < a file given with --config < options on the command line
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Option:
    """How a field is shown on the command line.

    Attributes:
        metavar: stands for the value in the help; None for a switch.
        panel: heading in the help and in the report.
        shown: words that stand for the default in the help; None for the default itself.
        short: a letter with its dash.
        known: the words that it takes, where they are not in its type.
        positional: an argument, without dashes.
        hidden: has no option of its own: ``--set``, ``--config`` and Python set it.
    """

    metavar: str | None = None
    panel: str | None = None
    shown: str | None = None
    short: str | None = None
    known: tuple[str, ...] = ()
    positional: bool = False
    hidden: bool = False


def option(default: Any, words: str, metavar: str | None = None, **how: Any) -> Any:
    """Declare an option: a field with its default, ``...`` for none, and words of its help.

    ``how`` has attributes of `Option`, and bounds of the value such as ``ge=1``.
    """
    bounds = {name: how.pop(name) for name in ("ge", "gt", "le", "lt") if name in how}
    shown: Any = {"option": Option(metavar, **how)}
    return Field(default, description=words, json_schema_extra=shown, **bounds)


def written(parse: Callable[[str], Any], *words: str) -> BeforeValidator:
    """Return a validator of a field that reads text, other than these words, with ``parse``."""
    return BeforeValidator(lambda v: parse(v) if isinstance(v, str) and v not in words else v)


class Settings(BaseModel):
    """What a user asks for. Frozen; an unknown name is refused with a near one.

    Classes inherit from each other: a command takes the fields of all its base classes, and its
    settings can be given wherever one of these is asked for.

    Attributes:
        presets: name -> YAML file with values for some of the fields.
        default_preset: the one that holds where none is named.
        panels: headings of the help, in their order.
        hides: inherited fields that have no option of their own in this command.
        gone: earlier fields -> what to write now, in which ``{value}`` stands for the value.
        one_of: fields of which one is given: as an option, it wins over the others in a file.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    presets: ClassVar[Mapping[str, Path]] = {}
    default_preset: ClassVar[str | None] = None
    panels: ClassVar[tuple[str, ...]] = ()
    hides: ClassVar[frozenset[str]] = frozenset()
    gone: ClassVar[Mapping[str, str]] = {
        "recipe": "write --preset {value}",
        "push_to_hub": "write the folder, then run: hf upload {value} FOLDER",
        "private": "make the repository first: hf repo create NAME --private",
    }
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
        """Expand ``~``, as which a report writes the home folder."""
        at_home = isinstance(value, Path) and value.parts[:1] == ("~",)
        return Path.home().joinpath(*value.parts[1:]) if at_home else value

    @property
    def given(self) -> frozenset[str]:
        """The fields that were given by name, not by a preset or default."""
        return self._given

    @property
    def reads(self) -> list[str]:
        """The models that are read, which no output may replace."""
        names = ("model", "teacher", "control", "against", "like")
        return [str(of) for of in (getattr(self, name, None) for name in names) if of]

    @classmethod
    def beside(cls, preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return what of a preset holds beside what was given."""
        del given
        return preset

    @classmethod
    def read(cls: type[_S], given: Mapping[str, Any], config: Path | None = None) -> _S:
        """Return a command's settings; options win over a YAML file. UserError if one is wrong."""
        filed = {} if config is None else read_yaml(config, f"--config {config}", cls)
        gone = cls.one_of if given.keys() & cls.one_of else ()
        return cls(**{**{name: of for name, of in filed.items() if name not in gone}, **given})

    @classmethod
    def of_preset(cls, name: str | None) -> dict[str, Any]:
        """Return the fields that a preset sets: by its name, or by the path of a YAML file."""
        name = str(name or cls.default_preset or "") or None
        if name is None or not cls.presets:
            return {}
        file = cls.presets.get(name, expanded(str(name)))
        if not file.is_file():
            raise UserError(
                f"no preset {name!r}; {near(name, cls.presets)}known are {', '.join(cls.presets)}, "
                "or give a YAML file"
            )
        said = read_yaml(file, f"preset {name}", cls)
        if (other := said.get("preset")) is not None:
            raise UserError(f"preset {name} names preset {other}; give this file as --config")
        return {**said, "preset": name}

    @classmethod
    def shown(cls) -> dict[str, Option]:
        """Return the fields that have an option of their own."""
        found = {name: option_of(field) for name, field in cls.model_fields.items()}
        return {
            name: how for name, how in found.items() if not how.hidden and name not in cls.hides
        }

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
            try:
                plain = _reads_text(cls.model_fields[name])
                found[name] = value if plain else yaml.safe_load(value)
            except yaml.YAMLError:
                raise UserError(f"--set {text}: {value} is not YAML; correct it") from None
        return found

    @classmethod
    def renamed(cls, name: str, value: object) -> str | None:
        """Return what to write in place of an earlier option, or None if there was none."""
        if name in cls.gone:
            return f"{option_name(name)} went: {cls.gone[name].format(value=value)}"
        if name in cls.model_fields and name not in cls.shown():
            return f"{option_name(name)} is a setting now: write --set {name}={value}"
        return None

    @classmethod
    def unknown(cls, where: str, name: str, value: object) -> str:
        """Say that a name is no setting, and which one is near or took its place."""
        if name in cls.gone:
            return f"{where}: {name} went: {cls.gone[name].format(value=value)}"
        hint = near(name, cls.model_fields).strip() or f"known are {', '.join(cls.model_fields)}"
        return f"{where}: {name} is no setting; {hint}"

    def but(self: _S, **changes: Any) -> _S:
        """Return the same settings with other values, which are checked; None for a default."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        values |= changes
        changed = type(self)(**values)
        fields = type(self).model_fields
        cleared = {name: fields[name].default for name, of in values.items() if of is None}
        changed = changed.model_copy(update=cleared)  # whatever a preset says
        changed._given = self._given | changes.keys()
        return changed

    def written(self) -> dict[str, Any]:
        """Return plain values that give the same settings: what was given, and the preset.

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


def option_name(name: str) -> str:
    """Return how the option of a field is written."""
    return "--" + name.replace("_", "-")


def near(name: str, known: Any) -> str:
    """Return "did you mean ...? " if a known name is near, else nothing."""
    close = difflib.get_close_matches(name, [str(one) for one in known], n=1)
    return f"did you mean {close[0]}? " if close else ""


def read_yaml(file: Path, what: str, kind: type[Settings]) -> dict[str, Any]:
    """Return the settings in a YAML file; UserError for what is no field of ``kind``."""
    try:
        data = yaml.safe_load(expanded(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}; give a YAML file") from error
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{what} is not YAML{where}; correct it there") from error
    if not isinstance(data, dict):
        raise UserError(f"{what} holds no settings; write lines such as 'criterion: fisher'")
    for name, value in data.items():
        if name not in kind.model_fields:
            raise UserError(kind.unknown(what, str(name), value))
    return data


def kinds_of(field: FieldInfo) -> tuple[list[Any], list[Any]]:
    """Return the types that a field takes, of unions and ``Annotated``, and their validators."""
    kinds: list[Any] = []
    left: list[Any] = [field.annotation]
    found = [*field.metadata]
    while left:
        kind = left.pop()
        if get_origin(kind) is Annotated:
            found += kind.__metadata__
            left.append(kind.__origin__)
        elif get_origin(kind) in (Union, types.UnionType):
            left += get_args(kind)
        else:
            kinds.append(kind)
    return kinds, found


def _reads_text(field: FieldInfo) -> bool:
    """Whether a field takes text as it is: others take what YAML makes of it."""
    kinds, found = kinds_of(field)
    return bool({str, Path} & {*kinds}) or any(isinstance(one, BeforeValidator) for one in found)


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
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return kind.unknown(kind.__name__, name, first["input"])
    fields = kind.model_fields
    if first["type"] == "missing":
        lacking = [str(one["loc"][0]) for one in (first, *more) if one["type"] == "missing"]
        return _missing({name: option_of(fields[name]) for name in lacking})
    value = str(first["input"])[:60]
    words = [w for k in kinds_of(fields[name])[0] if get_origin(k) is Literal for w in get_args(k)]
    if words and first["type"] == "literal_error":
        return _unknown(name, value, words)
    text = first["msg"].removeprefix("Value error, ").removeprefix("Input ").split(", unable")[0]
    shown = option_name(name) if name in kind.shown() else name
    return f"{shown} {value} {text[:1].lower()}{text[1:]}; correct it"
