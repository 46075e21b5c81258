"""``--push-to-hub``: what is sent, what stays, and what is said where it fails. Nothing is sent."""

from __future__ import annotations

import fnmatch
import glob
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

from command import Result, done, figures, run, save_tiny, write_text
from llm_pruner.commands import publish
from llm_pruner.commands.publish import LOCAL

pytestmark = pytest.mark.slow

REPOSITORY = ("--push-to-hub", "me/small")
L2 = ("--ratio", 0.2, "--criterion", "l2", "--scope", "global", "--no-verify")


class Address(str):
    """What the hub calls a repository."""

    repo_id = "me/small"


class Hub:
    """Stands for ``HfApi`` and notes what it is asked.

    Attributes:
        public: whether the repository is there already, and public.
        fails: what an upload raises.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.public = False
        self.fails: Exception | None = None

    def create_repo(self, repository: str, **how: Any) -> Address:
        self.calls.append(("create", {"repository": repository, **how}))
        return Address("https://huggingface.co/me/small")

    def repo_info(self, repository: str) -> SimpleNamespace:
        return SimpleNamespace(private=not self.public)

    def list_repo_files(self, repository: str) -> list[str]:
        stale = ["model-00001-of-00002.safetensors", "chat_template.jinja", "added[1].py"]
        return [*stale, "README.md", "v1/model.safetensors", "eval/run.py", "figure.png"]

    def upload_folder(self, **how: Any) -> None:
        files = {str(file.relative_to(how["folder_path"])) for file in _files(how["folder_path"])}
        ignored = how.pop("ignore_patterns")
        how["sent"] = {
            name for name in files if not any(fnmatch.fnmatch(name, one) for one in ignored)
        }
        self.calls.append(("upload", how))
        if self.fails is not None:
            raise self.fails


def _files(folder: Path) -> list[Path]:
    return [path for path in Path(folder).rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish")
    save_tiny(folder / "dense", num_hidden_layers=3)
    write_text(folder / "text.txt", 600)
    return folder


@pytest.fixture
def hub(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub to which somebody is logged in; the current folder is empty."""
    there = Hub()
    monkeypatch.setattr(publish, "HfApi", lambda: there)
    monkeypatch.setattr(publish, "get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return there


def pruned(place: Path, *options: object) -> Result:
    return run("prune", place / "dense", "--out", "small", *L2, *options)


def test_a_model_with_its_card_is_sent_and_records_stay(place: Path, hub: Hub) -> None:
    result = pruned(place, *REPOSITORY, "--private")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == "uploaded to https://huggingface.co/me/small"
    (made, repository), (sent, upload) = hub.calls
    assert (made, repository) == (
        "create",
        {"repository": "me/small", "private": True, "exist_ok": True},
    )
    assert (sent, upload["repo_id"]) == ("upload", "me/small")
    # What a loader would take for the new ones goes, and nothing of other folders.
    stale = ("model-00001-of-00002.safetensors", "chat_template.jinja", "added[1].py", "README.md")
    assert upload["delete_patterns"] == [glob.escape(name) for name in stale]
    assert upload["sent"] == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("modeling_pruned.py", "plan.json", "tokenizer.json", "tokenizer_config.json"),
    }
    for name in upload["sent"]:
        assert str(place.parent).encode() not in (Path("small") / name).read_bytes(), name
    assert "llm-pruner prune dense --out small" in Path("small/README.md").read_text()


def test_nothing_is_sent_that_nobody_asked_for(place: Path, hub: Hub) -> None:
    assert pruned(place, *REPOSITORY).code == 0
    assert hub.calls[0][1]["private"] is None
    hub.calls.clear()
    request = yaml.safe_load(Path("small/request.yaml").read_text())
    assert "push_to_hub" not in request
    again = done("prune", place / "dense", "--config", "small/request.yaml", "--out", "again")
    assert hub.calls == []
    assert "uploaded" not in again.out


def test_recover_and_compress(place: Path, hub: Hub) -> None:
    training = (
        "--data",
        place / "text.txt",
        "--trainer",
        "max_steps=1",
        "--batch-size",
        1,
        "--seq-len",
        16,
    )
    result = run("recover", place / "dense", "--out", "better", *training, *REPOSITORY)
    assert result.code == 0, result.err
    sent = hub.calls[-1][1]
    assert (sent["folder_path"], "recovery.json" in sent["sent"]) == (Path("better"), False)
    Path("l2.yaml").write_text("criterion: l2\nstructures: [ffn]\nprotect_first: 0\n")
    options = ("--preset", "l2.yaml", "--perplexity", place / "text.txt", "--no-recover")
    options = ("compress", place / "dense", "--out", "c", *options, *REPOSITORY)
    with mock.patch("llm_pruner.commands.compress.measure_apart", figures):
        result = run(*options, "--json", "-")
    assert result.code == 0, result.err
    assert hub.calls[-1][1]["folder_path"] == Path("c")
    assert "uploaded" not in result.out  # but JSON


def test_an_upload_that_fails_leaves_the_folder(place: Path, hub: Hub) -> None:
    hub.fails = OSError("no route to host")
    result = pruned(place, *REPOSITORY)
    assert result.code == 1
    assert "saved to small" in result.out
    (line,) = result.err.splitlines()
    said, _, again = line.partition("; try again with ")
    assert said == (
        "llm-pruner: small is complete, but was not uploaded to me/small (OSError: no route to "
        "host)"
    )
    words = shlex.split(again)
    assert words[:5] == ["hf", "upload", "me/small", "small", "."]
    assert [word for word in words[5:] if word[:2] != "--"] == [*LOCAL]
    assert Path("small/model.safetensors").is_file()


def test_a_private_model_is_not_sent_to_a_public_place(place: Path, hub: Hub) -> None:
    hub.public = True
    result = pruned(place, *REPOSITORY, "--private")
    assert result.code == 1
    assert "me/small is there already and everybody sees it, so nothing was up" in result.err
    assert [name for name, _ in hub.calls] == ["create"]
