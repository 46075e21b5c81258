"""The upload of a finished folder to the Hugging Face hub, where the user asked for it."""

from __future__ import annotations

import glob
import shlex
from fnmatch import fnmatch

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from llm_pruner.errors import LLMPrunerError, UserError, in_short
from llm_pruner.runtime.progress import quiet_bars
from llm_pruner.settings.common import OutputSettings
from llm_pruner.version import __version__

LOCAL = (
    *(".*", "adapter/*", "recovery.json", "report.html", "report.json", "request.yaml"),
    "vocabulary.json",
)
"""What is not uploaded: it names folders, texts and the machine, or belongs to another model."""

REPLACED = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.py"),
    *("adapter_config.json", "adapter_model.*", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "tekken.json"),
    *("README.md", "plan.json"),
)
"""Files of an earlier upload beside the config, which would be loaded with the new ones."""


def check_push(settings: OutputSettings) -> None:
    """Raise UserError for an upload that cannot be; nothing is sent to find that out."""
    repository = settings.push_to_hub
    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"--push-to-hub {repository} is no repository; write such as me/small"
        ) from error
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {repository} needs an account of the hub; run 'hf auth login', or set "
            "HF_TOKEN"
        )


def push(settings: OutputSettings) -> str | None:
    """Upload the folder but ``LOCAL``, in one commit; return its address, None if unasked.

    Raises LLMPrunerError if the upload failed; the folder is as it was.
    """
    repository, out = settings.push_to_hub, settings.out
    if repository is None:
        return None
    api = HfApi()
    try:
        with quiet_bars("huggingface_hub"):
            made = api.create_repo(repository, private=settings.private or None, exist_ok=True)
            private = not settings.private or api.repo_info(made.repo_id).private
            if private:
                there = [name for name in api.list_repo_files(made.repo_id) if _is_replaced(name)]
                api.upload_folder(
                    repo_id=made.repo_id,
                    folder_path=out,
                    commit_message=f"Upload of llm-pruner {__version__}",
                    ignore_patterns=list(LOCAL),
                    delete_patterns=[glob.escape(name) for name in there],
                )
    except Exception as error:  # of the network, the hub or the disk
        raise LLMPrunerError(
            f"{out} is complete, but was not uploaded to {repository} ({in_short(error)}); "
            f"try again with {_by_hand(settings)}"
        ) from error
    if not private:
        raise LLMPrunerError(
            f"{out} is complete, but {repository} is there already and everybody sees it, so "
            "nothing was uploaded; make it private on the hub, or take another name"
        )
    return str(made)


def _is_replaced(name: str) -> bool:
    templates = name.startswith("additional_chat_templates/")
    return templates or ("/" not in name and any(fnmatch(name, one) for one in REPLACED))


def _by_hand(settings: OutputSettings) -> str:
    """Return a command that uploads the same."""
    excluded = [word for one in LOCAL for word in ("--exclude", one)]
    words = ["hf", "upload", str(settings.push_to_hub), str(settings.out), ".", *excluded]
    return shlex.join(words + ["--private"] * settings.private)
