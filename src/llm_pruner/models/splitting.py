"""The rules by which text is split before tokens are merged, and llama.cpp's names for them.

llama.cpp has them built in, a GGUF file names one, and transformers does not read the name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from tokenizers import Regex, Tokenizer, pre_tokenizers

Rules: TypeAlias = tuple[object, ...]
"""Whether whole tokens need no merges, and the rules in order.

A rule is ``ByteLevel`` for GPT-2's own expression, ``Digits`` for single digits, or an expression.
"""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
)
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_TAIL = r"%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES

NAMES: dict[Rules, str] = {
    (False, "ByteLevel"): "gpt-2",
    (False, "Digits", "ByteLevel"): "smollm",
    (False, _WORDS % r"\p{N}"): "qwen2",
    (False, _WORDS % r"\p{N}{1,3}"): "smaug-bpe",
    (True, _WORDS % r"\p{N}{1,3}"): "llama-bpe",
    (True, _CASED % ("", "") + _TAIL % r"\p{N}"): "tekken",
    (False, _CASED % ((f"{_CONTRACTIONS}?",) * 2) + _TAIL % r"\p{N}{1,3}"): "gpt-4o",
}
"""Rules -> llama.cpp's name."""


def rules_of(data: dict[str, Any]) -> Rules:
    """Return the rules in the JSON of a tokenizer of the library ``tokenizers``."""
    rules = map(_rule, steps_of(data.get("pre_tokenizer")))
    return (bool(data["model"].get("ignore_merges")), *filter(None, rules))


def steps_of(one: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or of what splits text, one in the other or not."""
    if one is not None and one["type"] == "Sequence":
        for step in one.get("normalizers") or one.get("pretokenizers") or ():
            yield from steps_of(step)
    elif one is not None:
        yield one


def split_as_named_(tokenizer: Tokenizer, name: object) -> None:
    """Have a tokenizer of bytes split text by the rules of a name; another changes nothing."""
    known = next((rules for rules, one in NAMES.items() if one == name), None)
    data = json.loads(tokenizer.to_str())
    bytewise = any(step["type"] == "ByteLevel" for step in steps_of(data.get("pre_tokenizer")))
    if known is None or data["model"]["type"] != "BPE" or not bytewise or rules_of(data) == known:
        return
    whole, *rules = known
    steps: list[Any] = [_step(str(rule)) for rule in rules]
    if rules[-1] != "ByteLevel":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.model.ignore_merges = whole


def _step(rule: str) -> pre_tokenizers.PreTokenizer:
    """Return a rule as a step that `_rule` reads as it."""
    if rule == "Digits":
        return pre_tokenizers.Digits(individual_digits=True)
    if rule == "ByteLevel":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Split(Regex(rule), "isolated")


def _rule(step: dict[str, Any]) -> str | None:
    """Return a step as `Rules` have it; None for the one that only writes bytes as letters."""
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    if step["type"] == "Digits" and step["individual_digits"]:
        return "Digits"
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel" if step.get("use_regex", True) else None
    return json.dumps(step, sort_keys=True)
