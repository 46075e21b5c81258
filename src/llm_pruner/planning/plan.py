"""The Plan: which units go, as JSON that a person can read, edit, diff and replay.

Units are named in the numbering of the dense model, also after several steps. Nothing derived is
stored (no counts, no size afterwards), so an edit cannot contradict itself, and no time or path of
the run, so equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_pruner.errors import PlanError, UserError
from llm_pruner.files.disk import expanded, short_digest
from llm_pruner.files.ranges import MOST_UNITS, format_ranges, parse_ranges
from llm_pruner.planning.constraints import check
from llm_pruner.surgery.removal import checked_removal, count_parameters
from llm_pruner.types import Discovery, IntArray, Removal

FORMAT_VERSION: Literal[2] = 2


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class PlanModel(_Strict):
    """The dense model that the units refer to."""

    name: str
    revision: str | None = None
    fingerprint: str
    parameters: Annotated[int, Field(ge=0, lt=2**63)]


class PlanGroup(_Strict):
    """One group that loses units; ``removed`` is text such as ``"3,17,40-44"``."""

    name: str
    kind: str
    size: Annotated[int, Field(ge=1, le=MOST_UNITS)]
    removed: str


_Scalar: TypeAlias = bool | int | float | str | None
_Setting: TypeAlias = _Scalar | list[_Scalar] | dict[str, _Scalar | list[_Scalar]]
"""A value of an option; numbers are finite."""


class Plan(_Strict):
    """A removal with all that it came from. Only ``model`` and ``groups`` matter for a replay.

    Attributes:
        settings: of ``prune``, by the names of its options, with what it decided itself in place of
            ``auto``: protected layers, the split, the multiple to round to, but for purposes that
            round heads as well.
        text: digest of the calibration tokens.
    """

    format_version: Literal[2]
    package_version: str
    model: PlanModel
    settings: dict[str, _Setting] = {}
    text: str | None = None
    groups: tuple[PlanGroup, ...]

    @classmethod
    def from_removal(
        cls,
        discovery: Discovery,
        removal: Removal,
        *,
        package_version: str,
        model_name: str,
        revision: str | None = None,
        settings: Mapping[str, Any] | None = None,
        text: str | None = None,
    ) -> Plan:
        """Return the Plan of a removal in dense numbering; ``discovery`` is the dense model's.

        Raises:
            InfeasibleError: a group is unknown, or has no such units.
        """
        removal = checked_removal(discovery, removal)
        return cls(
            format_version=FORMAT_VERSION,
            package_version=package_version,
            model=PlanModel(
                name=model_name,
                revision=revision,
                fingerprint=fingerprint(discovery),
                parameters=count_parameters(discovery),
            ),
            settings=dict(settings or {}),
            text=text,
            groups=tuple(
                PlanGroup(
                    name=group.name,
                    kind=group.kind,
                    size=group.size,
                    removed=format_ranges(removal[group.name]),
                )
                for group in discovery.groups
                if len(removal.get(group.name, ()))
            ),
        )

    def to_json(self) -> str:
        """Return the Plan as JSON: one line for each setting, one for each group."""
        data = self.model_dump(mode="json")
        rows, settings = data.pop("groups"), data.pop("settings")
        lines = [f"  {_text(key)}: {_text(value)}," for key, value in data.items()]
        said = ",\n".join(f"    {_text(key)}: {_text(value)}" for key, value in settings.items())
        lines.append(f'  "settings": {{\n{said}\n  }},' if said else '  "settings": {},')
        body = ",\n".join(f"    {_text(row)}" for row in rows)
        groups = f"[\n{body}\n  ]" if rows else "[]"
        return "\n".join(["{", *lines, f'  "groups": {groups}', "}", ""])

    def removal(self, discovery: Discovery) -> dict[str, IntArray]:
        """Return the units to remove, in the order of the discovery, after checking all of them.

        The name and the revision of the model are not compared: a copy may lie elsewhere, and a
        fine-tuned model has the same structure.

        Raises:
            PlanError: with every problem: made for another model, unknown or repeated groups, other
                sizes, malformed units, or a breach of the rules of `planning.constraints.check`.
        """
        problems = self._model_problems(discovery)
        found: dict[str, IntArray] = {}
        unreadable: set[str] = set()
        for row in self.groups:
            group = discovery.by_name.get(row.name)
            if row.name in found.keys() | unreadable:
                problems.append(f"{row.name}: has two lines; merge them")
                continue
            if group is not None and row.size != group.size:
                problems.append(f"{row.name}: has {group.size} units, the plan says {row.size}")
            try:
                found[row.name] = parse_ranges(row.removed, None if group is None else group.size)
            except UserError as error:
                problems.append(f"{row.name}: {error}")
                unreadable.add(row.name)
        problems.extend(check(discovery, found, unreadable))
        if problems:
            raise PlanError(problems)
        return {name: found[name] for name in discovery.by_name if len(found.get(name, ()))}

    def _model_problems(self, discovery: Discovery) -> list[str]:
        if self.model.fingerprint == fingerprint(discovery):
            return []
        return [
            f"made for another model: {self.model.name} has {self.model.parameters:,} parameters, "
            f"this one {count_parameters(discovery):,}, or its tensors have other names or shapes; "
            "make a new plan"
        ]


def fingerprint(discovery: Discovery) -> str:
    """Return 16 hex digits of SHA-256 over names and shapes of all parameters and what is tied."""
    content = json.dumps(
        [
            sorted((name, list(shape)) for name, shape in discovery.shapes.items()),
            sorted(discovery.aliases.items()),
        ]
    )
    return short_digest(content)


def read_plan(source: str | Path) -> Plan:
    """Return the Plan in a file, or in a text that starts with a brace.

    Raises:
        UserError: the file cannot be read, or is no JSON (with line and column).
        PlanError: fields that are missing, unknown or of the wrong type; all of them.
    """
    written = isinstance(source, str) and source.lstrip().startswith("{")
    try:
        data = json.loads(str(source) if written else expanded(source).read_text("utf-8"))
    except (OSError, ValueError) as error:
        where = "the plan" if written else f"plan {source}"
        raise UserError(f"{where} cannot be read ({error}); give a plan.json") from error
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise PlanError(
            [
                f"{'.'.join(map(str, item['loc'])) or 'plan'}: {item['msg']}"
                for item in error.errors()
            ]
        ) from error


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
