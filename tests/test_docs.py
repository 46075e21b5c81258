"""README and docs: links, lengths, the Python blocks, and the commands."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from command import done, run, save_tiny, write_text
from llm_pruner.cli import app
from llm_pruner.settings.registry import CRITERIA

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_HAND = [page for page in PAGES if not page.read_text("utf-8").startswith("<!-- Generated")]
BLOCK = re.compile(r"(?:<!-- ([\w-]+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OTHERS = {
    "--model-impl",
    "--plan",
    "--trainer",
    "--help",
    "--use_fsdp",
    "--multi_gpu",
    "--enforce-eager",
}
"""Options in the text that are of other programs, or of another form."""
HERE = {
    '"HuggingFaceTB/SmolLM2-135M"': '"dense"',
    '"c4"': '"text.txt"',
    '"wikitext2"': '"other.txt"',
    '"alpaca.jsonl"': '"text.txt"',
    "lp.Lora(": 'lp.Lora(trainer={"max_steps": 1}, batch_size=2, seq_len=32, ',
    "paper(ratio=0.2": "paper(ratio=0.05, protect_first=1, protect_last=1",
}
"""What the Python of the pages reads -> what lies in the folder of the tests."""
SHORT = {
    "prune": "--samples 8 --set seq_len=32",
    "recover": "--trainer max_steps=1 --set seq_len=32 --set held_out=4 --samples 20",
    "evaluate": "--set max_tokens=512 --set seq_len=64 --set new_tokens=4",
}
"""Command -> what makes it short."""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Yield the mark before each code block of a language, and what is in it."""
    for mark, language, text in BLOCK.findall(page.read_text("utf-8")):
        if language == kind:
            yield mark, text


def commands(page: Path, mark: str | None = None) -> Iterator[list[str]]:
    """Yield the words of each ``llm-pruner`` command in the shell blocks of a page."""
    for marked, text in blocks(page, "bash"):
        if marked == "not-ours" or mark not in (None, marked):
            continue
        for line in re.split(r"\n|&&|\|", text.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            for program in (["llm-pruner"], ["-m", "llm_pruner"]):
                for at in range(len(words)):
                    if words[at : at + len(program)] == program:
                        yield words[at + len(program) :]


def parse(words: list[str]) -> None:
    """Raise where a command has no such option or setting."""
    name, *rest = words
    if name == "--version":
        return
    context = COMMANDS[name].make_context(name, rest)
    kind = getattr(COMMANDS[name], "kind", None)
    if kind is not None:
        kind.from_texts([text for text in context.params["set"] or [] if text != "help"])


def slugs(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_lengths() -> None:
    words = {page: len(page.read_text("utf-8").split()) for page in BY_HAND}
    assert words[ROOT / "README.md"] <= 800
    assert words[ROOT / "CONTRIBUTING.md"] <= 500
    assert sum(count for page, count in words.items() if page.parent != ROOT) <= 25_000


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        file, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize("page", BY_HAND, ids=named)
def test_commands_have_their_options(page: Path) -> None:
    for words in commands(page):
        parse(words)
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    known = {flag for one in COMMANDS.values() for param in one.params for flag in param.opts}
    kinds = [one.kind for one in COMMANDS.values() if getattr(one, "kind", None)]
    fields = {"hidden", *(name for kind in kinds for name in kind.model_fields)}
    for code in re.findall(r"`([^`\n]+)`", text):
        if page.name in ("design.md", "tried.md"):
            continue  # they name what went
        assert set(re.findall(r"(?:^|--set )([a-z_]+)=", code)) <= fields, code
        if code.split()[0] in COMMANDS and "--" in code:
            name = code.split()[0]
            flags = {flag for param in COMMANDS[name].params for flag in param.opts} | OTHERS
            assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= flags, code
        elif code.startswith("--"):
            assert code.split()[0].split("=")[0] in known | OTHERS, code


def test_the_generated_pages_are_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    reference = importlib.import_module("reference_pages")
    folder = ROOT / "docs" / "reference"
    assert reference.options_page() == (folder / "options.md").read_text("utf-8"), "make docs"
    assert reference.python_page() == (folder / "python.md").read_text("utf-8"), "make docs"


@pytest.mark.parametrize("name", CRITERIA)
def test_each_criterion_has_a_row(name: str) -> None:
    rows = (ROOT / "docs/reference/criteria.md").read_text("utf-8").splitlines()
    assert any(f"`{name}`" in row.split("|")[1] for row in rows if row.startswith("| `"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    save_tiny(folder / "dense")
    write_text(folder / "text.txt", 20_000)
    write_text(folder / "other.txt", 6000)
    return folder


@pytest.fixture(scope="module")
def small(place: Path) -> None:
    """The folder that most pages begin with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        size = ("--ratio", 0.1, "--calibration", "text.txt", "--samples", 8, "--set", "seq_len=32")
        done("prune", "dense", "--out", "small", *size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [one for one in BY_HAND if "```python" in one.read_text("utf-8")], ids=named
)
@pytest.mark.usefixtures("small", "here")
def test_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    for mark, code in blocks(page, "python"):
        if mark != "no-run":
            for there, mine in HERE.items():
                code = code.replace(there, mine)
            code = code.replace('.save("small")', f'.save("{tmp_path / "small"}")')
            exec(compile(code, named(page), "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", [one for one in BY_HAND if any(commands(one, "run"))], ids=named)
@pytest.mark.usefixtures("small", "here")
def test_commands_run(page: Path, place: Path) -> None:
    texts = {"c4": "text.txt", "code": "text.txt", "wikitext2": "other.txt"}
    for name, *rest in commands(page, "run"):
        words = [
            "dense"
            if word == "MODEL" or word.startswith("HuggingFaceTB/")
            else texts.get(word, word)
            for word in rest
        ]
        known = {flag for param in COMMANDS[name].params for flag in param.opts}
        if "--overwrite" in known and "--out" in words:
            words.append("--overwrite")
        result = run(name, *words, *shlex.split(SHORT.get(name, "")))
        assert result.code == 0, (name, words, result.err)
