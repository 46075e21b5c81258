"""Tokenizers that are read and saved as their file says.

transformers 5 builds most classes of tokenizers anew from the vocabulary and the merges in
``tokenizer.json``. What that file says of how text is split before merging is lost where the class
says otherwise: of SmolLM2 and StarCoder2, which are called ``GPT2Tokenizer``, that each digit is a
token by itself (huggingface/transformers, issues 45812 and 45920).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"

_PROBE = (
    "In 2024, 1,234.5 and 0x7F: it's  they'LL   we\u2019ve\n\n\t\tdef f(x):\n    return x**2 # {a}"
    "\r\nnaïve cafe\u0301 Straße HTTPServer 日本語のテキスト 한국어 עברית हिन्दी ไทย 👩!!"
)
"""Text that what splits before merging tells apart."""


def read_tokenizer(source: str, shared: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the tokens of its ``tokenizer.json``, if its folder or id has one.

    ``shared`` is what else ``from_pretrained`` is given. Raises whatever tokenizers' code raises.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **shared)
    rebuilt = isinstance(tokenizer, PreTrainedTokenizerFast) and _is_of_transformers(tokenizer)
    if not rebuilt or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    how: dict[str, Any] = {
        "revision": shared.get("revision"),
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if cached_file(source, _FILE, **how) is None:
        return tokenizer
    stated = PreTrainedTokenizerFast.from_pretrained(source, **shared)
    ids = [one(_PROBE, add_special_tokens=False)["input_ids"] for one in (tokenizer, stated)]
    return tokenizer if ids[0] == ids[1] else stated


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer for older transformers, too, without code besides a class of theirs."""
    named = tokenizer.init_kwargs
    code = named.pop("auto_map", None) if _is_of_transformers(tokenizer) else None
    try:
        tokenizer.save_pretrained(folder)
    finally:
        if code is not None:
            named["auto_map"] = code
    if type(tokenizer) is PreTrainedTokenizerFast:
        said = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        said["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4
        text = json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _is_of_transformers(tokenizer: PreTrainedTokenizerBase) -> bool:
    return type(tokenizer).__module__.startswith("transformers.")
