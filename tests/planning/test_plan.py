"""The Plan: written the same each time, read back, and refused as a whole when it is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fake_discovery import fake_llama, fake_scores, units
from llm_pruner.errors import PlanError, UserError
from llm_pruner.files.ranges import format_ranges, parse_ranges
from llm_pruner.planning import (
    Plan,
    Selection,
    Target,
    allocate,
    explain,
    read_plan,
)
from llm_pruner.types import Discovery, Removal

DENSE = fake_llama(4, ffn=96, frozen={"layers.3.ffn": "feeds a sort"})


def make_plan(removal: Removal, discovery: Discovery = DENSE) -> Plan:
    return Plan.from_removal(
        discovery,
        removal,
        package_version="0.1.0",
        model_name="tiny",
        settings={"ratio": 0.2, "structures": ["ffn", "heads"], "layers": {"heads": [0, 2]}},
        text="0123",
    )


def edited(plan: Plan, **changes: object) -> Plan:
    """Return the plan with lines replaced: group name -> changed fields, or None to drop it."""
    data = json.loads(plan.to_json())
    for name, fields in changes.items():
        data[name] = fields
    return read_plan(json.dumps(data))


def row(name: str, kind: str, size: int, removed: str) -> dict[str, object]:
    return {"name": name, "kind": kind, "size": size, "removed": removed}


def problems(plan: Plan, discovery: Discovery = DENSE) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        plan.removal(discovery)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3,17,40-44", [3, 17, 40, 41, 42, 43, 44]),
        ("", []),
        ("5", [5]),
        (" 9 , 2-3", [2, 3, 9]),
        ("0-1", [0, 1]),
    ],
)
def test_ranges_are_read(text, found):
    assert parse_ranges(text).tolist() == found


def test_ranges_are_written_and_read_back():
    assert format_ranges(units(3, 17, 40, 41, 42, 43, 44)) == "3,17,40-44"
    assert format_ranges(units(1, 2, 4)) == "1-2,4"
    assert format_ranges(units()) == ""
    generator = np.random.default_rng(0)
    for _ in range(50):
        some = np.flatnonzero(generator.random(60) < generator.random()).astype(np.int64)
        assert np.array_equal(parse_ranges(format_ranges(some), 60), some)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,x", "'x' is not a unit or a range; write such as"),
        ("3,,4", "'' is not a unit"),
        ("1-2-3", "is not a unit or a range"),
        ("-4", "'-4' is not a unit or a range"),
        ("9-3", "range 9-3 runs backwards; write 3-9"),
        ("1-5,4-6,9,9", "duplicate units 4-5,9"),
        ("0-99999999999999", "unit 99999999999999 is out of range; there are 96 units, 0 to 95"),
    ],
)
def test_ranges_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_ranges(text, 96)


def test_plan_is_one_line_for_each_group():
    plan = make_plan({"layers.2.heads": units(1), "layers.0.ffn": units(3, 17, 40, 41, 42)})
    assert plan.to_json().splitlines() == [
        "{",
        '  "format_version": 2,',
        '  "package_version": "0.1.0",',
        '  "model": {"name": "tiny", "revision": null, '
        f'"fingerprint": "{plan.model.fingerprint}", "parameters": {plan.model.parameters}}},',
        '  "text": "0123",',
        '  "settings": {',
        '    "ratio": 0.2,',
        '    "structures": ["ffn", "heads"],',
        '    "layers": {"heads": [0, 2]}',
        "  },",
        '  "groups": [',
        '    {"name": "layers.0.ffn", "kind": "ffn", "size": 96, "removed": "3,17,40-42"},',
        '    {"name": "layers.2.heads", "kind": "heads", "size": 4, "removed": "1"}',
        "  ]",
        "}",
    ]


def test_plan_goes_round_byte_for_byte(tmp_path):
    structures = ("heads", "query_heads", "ffn", "hidden", "head_dim", "layers")
    removal = allocate(DENSE, fake_scores(DENSE), Selection(structures), Target(ratio=0.3))
    text = make_plan(removal).to_json()
    again = allocate(DENSE, fake_scores(DENSE), Selection(structures), Target(ratio=0.3))
    assert make_plan(again).to_json() == text
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    plan = read_plan(file)
    assert plan == read_plan(str(file)) == read_plan(text)
    assert plan.to_json() == text
    replayed = plan.removal(DENSE)
    assert list(replayed) == list(removal)
    assert all(np.array_equal(replayed[name], removal[name]) for name in removal)


def test_edited_units_are_replayed_and_settings_may_be_dropped():
    plan = make_plan({"layers.0.ffn": units(3)})
    data = json.loads(plan.to_json())
    for key in ("settings", "text"):
        del data[key]
    data["groups"] = [row("layers.1.ffn", "ffn", 96, "9, 4-5"), row("hidden", "hidden", 48, "")]
    removal = read_plan(json.dumps(data)).removal(DENSE)
    assert {name: found.tolist() for name, found in removal.items()} == {"layers.1.ffn": [4, 5, 9]}


def test_every_problem_is_reported_at_once():
    plan = edited(
        make_plan({}),
        groups=[
            row("layers.0.fnn", "ffn", 96, "1"),
            row("layers.0.ffn", "ffn", 90, "1"),
            row("layers.0.heads", "ffn", 4, "0-3"),
            row("layers.1.heads", "heads", 4, "x"),
            row("layers.1.ffn", "ffn", 96, "3,3"),
            row("layers.2.ffn", "ffn", 96, "-3"),
            row("layers.2.ffn", "ffn", 96, "5"),
            row("layers.3.ffn", "ffn", 96, "5"),
            row("layers.2.heads", "heads", 4, "4"),
            row("layers.2.query_heads", "query_heads", 8, "0"),
            row("head_dim", "head_dim", 4, "0"),
            row("layers.0.value_dim", "value_dim", 8, "0-1"),
        ],
    )
    found = problems(plan)
    expected = [
        "layers.0.ffn: has 96 units, the plan says 90",
        "layers.1.heads: 'x' is not a unit or a range; write such as '3,17,40-44'",
        "layers.1.ffn: duplicate units 3; name each unit once",
        "layers.2.ffn: '-3' is not a unit or a range; write such as '3,17,40-44'",
        "layers.2.ffn: has two lines; merge them",
        "layers.2.heads: unit 4 is out of range; there are 4 units, 0 to 3",
        "layers.0.fnn: no such group; did you mean layers.0.ffn?",
        "layers.0.heads: removes all 4 units; at least one must stay",
        "layers.3.ffn: cannot lose units: feeds a sort",
        "layers.2.query_heads: every block that stays must lose the same number of units; "
        "this removes 1 of block 0, 0 of block 1, 0 of block 2, 0 of block 3",
        *(
            f"layers.{layer}.value_dim: loses 0 units but must lose 2, because head_dim loses 1 "
            "and each takes 2 with it"
            for layer in (1, 2, 3)
        ),
    ]
    assert list(found) == expected
    with pytest.raises(PlanError, match=r"^13 problems in the plan\n  - layers\.0\.ffn: has 96"):
        plan.removal(DENSE)


def test_plan_for_another_model():
    plan = make_plan({"layers.0.ffn": units(3)})
    larger = fake_llama(4, ffn=97)
    found = problems(plan, larger)
    assert found[0].startswith("made for another model: tiny has 95,664 parameters, this one")
    assert "layers.0.ffn: has 97 units, the plan says 96" in found
    # As many parameters, in other tensors.
    shapes = {name.replace("model.", "other."): s for name, s in DENSE.shapes.items()}
    renamed = Discovery(DENSE.groups, (), shapes, {}, DENSE.aliases)
    assert "other names or shapes; make a new plan" in problems(plan, renamed)[0]


def test_malformed_json_names_line_and_column(tmp_path):
    text = make_plan({"layers.0.ffn": units(3)}).to_json()
    broken = text.replace('"removed": "3"}', '"removed": "3",}')
    file = tmp_path / "plan.json"
    file.write_text(broken, encoding="utf-8")
    with pytest.raises(UserError, match=r"plan\.json cannot be read \(.*: line 12 column \d+ "):
        read_plan(file)
    with pytest.raises(UserError, match=r"^the plan cannot be read \(.*: line 2 column 1"):
        read_plan("{\n")


def test_files_that_are_no_plan(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json cannot be read .*No such file"):
        read_plan(tmp_path / "missing.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes\.json cannot be read .*can't decode byte"):
        read_plan(tmp_path / "bytes.json")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(PlanError, match="plan: Input should be"):
        read_plan(tmp_path / "list.json")


def test_wrong_fields_are_reported_together():
    data = json.loads(make_plan({"layers.0.ffn": units(3)}).to_json())
    data["format_version"] = 3
    data["colour"] = "red"
    del data["model"]["fingerprint"]
    data["groups"][0]["size"] = "many"
    data["groups"].append({"name": "hidden", "kind": "hidden", "size": 48})
    data["groups"].append(7)
    with pytest.raises(PlanError) as caught:
        read_plan(json.dumps(data))
    found = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 6
    assert "format_version: Input should be 2" in found
    assert "colour: Extra inputs are not permitted" in found
    assert "model.fingerprint: Field required" in found
    assert "groups.0.size: Input should be a valid integer" in found
    assert "groups.1.removed: Field required" in found
    assert "groups.2: Input should be" in found


def test_explain_gives_kept_sizes_by_layer():
    removal = {
        "hidden": units(1, 2),
        "layers": units(1),
        "layers.0.ffn": units(3, 4, 5),
        "layers.2.heads": units(0),
        "layers.2.query_heads": units(2, 5, 7),
    }
    rows = explain(DENSE, removal)
    assert [row.layer for row in rows] == [None, 0, 1, 2, 3]
    assert rows[0].sizes == {"hidden": (46, 48), "head_dim": (4, 4), "layers": (3, 4)}
    assert rows[1].sizes["ffn"] == (93, 96)
    assert [row.removed for row in rows[1:]] == [False, True, False, False]
    assert set(rows[2].sizes.values()) == {(0, 4), (0, 8), (0, 96)}
    # Key-value head 0 takes its two query heads along; three others lose one each.
    assert rows[3].sizes["heads"] == (3, 4)
    assert rows[3].sizes["query_heads"] == (3, 8)
