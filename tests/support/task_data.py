"""The seven zero-shot tasks with records that are made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = (
    "the", "old", "bridge", "river", "was", "built", "by", "people", "who", "lived", "near",
    "water", "and", "sang", "of", "stone", "boats",
)  # fmt: skip


def write_tasks(folder: Path, count: int = 6) -> Path:
    """Write ``count`` records of each task; one passage is longer than the tiny models read."""
    chance = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)

    def words(least: int, most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))

    def choices(number: int) -> dict[str, Any]:
        labels = list("ABCD")[:number]
        return {"text": [words(1, 4) for _ in labels], "label": labels}

    def passage(index: int) -> str:
        return words(150, 160) if index == 0 else words(8, 30)

    def question(field: str, index: int) -> dict[str, Any]:
        number = 3 if index == 1 else 4
        key = chance.choice("ABC")
        return {"id": str(index), field: words(3, 9), "choices": choices(number), "answerKey": key}

    records = {
        "boolq": lambda index: {
            "id": str(index),
            "passage": passage(index),
            "question": words(4, 8),
            "label": index % 2,
        },
        "piqa": lambda index: {
            "goal": words(3, 6),
            "sol1": words(3, 9),
            "sol2": words(3, 9),
            "label": chance.randint(0, 1),
        },
        "hellaswag": lambda index: {
            "ind": index,
            "activity_label": words(1, 2),
            "ctx_a": words(6, 14),
            "ctx_b": words(0, 3),
            "endings": [f"{words(3, 8)} [step] end" for _ in range(4)],
            "label": str(index % 4),
        },
        "winogrande": lambda index: {
            "sentence": f"{words(3, 6)} _ {words(3, 6)}",
            "option1": words(1, 2),
            "option2": words(1, 2),
            "answer": str(1 + index % 2),
        },
        "arc_easy": lambda index: question("question", index),
        "arc_challenge": lambda index: question("question", index),
        "openbookqa": lambda index: question("question_stem", index),
    }
    for task, make in records.items():
        write_records(folder / f"{task}.jsonl", [make(index) for index in range(count)])
    return folder


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


READER = """
import json
from pathlib import Path

import datasets

def load(local_file, **_):
    lines = (Path(__file__).parent / local_file).read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
"""
CHOICE = (
    "output_type: multiple_choice\ndoc_to_choice: '{{[sol1, sol2]}}'\ndoc_to_target: label\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
)


def write_own_task(folder: Path, data: Path, name: str, how: str = CHOICE, text: str = "") -> None:
    """Write a task of the harness on the records of PIQA, and what reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "offline_data.py").write_text(READER)
    (folder / "piqa.jsonl").write_bytes((data / "piqa.jsonl").read_bytes())
    text = text or "'{{goal}}'"
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ncustom_dataset: !function offline_data.load\n"
        f"dataset_kwargs: {{local_file: piqa.jsonl}}\ntest_split: test\ndoc_to_text: {text}\n{how}"
    )
