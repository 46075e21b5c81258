"""A tokenizer as llama.cpp reads it: from ``tokenizer.json``, or from another GGUF file.

llama.cpp has rules by which text is split before merging built in, under names; the name follows
from the rules in ``tokenizer.json``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from llm_pruner.errors import UserError
from llm_pruner.files.disk import read_json
from llm_pruner.models.gguf_file import NAMES, rules_of, steps_of
from llm_pruner.runtime.progress import quiet

_UNICODE = ("NFC", "NFD", "NFKC", "NFKD")
"""Normalisers that llama.cpp leaves out: most text is normal already."""

_OURS = "tokenizer."
"""How the keys of a GGUF file that tell of the tokenizer begin."""

_OF_ANOTHER = (
    "name a GGUF file of the model that it was made of with export --like, and its tokenizer is "
    "copied"
)


class _Special(gguf.SpecialVocab):
    """Special tokens and chat template of a folder, as transformers has them.

    What is added to a text follows ``tokenizer.json``, and a template file goes first. A negative
    id, as some configs have it, stands for none.
    """

    def _load(self, path: Path) -> None:
        super()._load(path)
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.no_padding()
        ids = tokenizer.encode("a").ids
        for kind, end in (("bos", ids[:1]), ("eos", ids[-1:])):
            self.add_special_token[kind] = end == [self.special_token_ids.get(kind)]
        template = path / "chat_template.jinja"
        if template.is_file():
            self.chat_template = template.read_text(encoding="utf-8")

    def _set_special_token(self, typ: str, tid: Any) -> None:
        if not (isinstance(tid, int) and tid < 0):
            super()._set_special_token(typ, tid)


def read_tokenizer(folder: Path, rows: int) -> dict[str, gguf.GGUFValue]:
    """Return all keys of a GGUF file that tell of the tokenizer in a folder, a token for each row.

    Raises UserError: it has no ``tokenizer.json``, or one that llama.cpp cannot follow.
    """
    try:
        data = read_json(folder / "tokenizer.json")
        if data["model"]["type"] != "BPE":
            raise ValueError(f"it is a {data['model']['type']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'tokenizer.json'} cannot be exported to GGUF ({error}); {_OF_ANOTHER}"
        ) from error
    bytewise = not data["model"].get("byte_fallback")
    pre = NAMES.get(rules_of(data)) if bytewise else "default"
    normal = {step["type"] for step in steps_of(data.get("normalizer"))}
    followed = normal <= set(_UNICODE) if bytewise else all(map(_marks_spaces, _all_steps(data)))
    if pre is None or not followed:
        raise UserError(
            f"llama.cpp has no name that is known here for how the tokenizer in {folder} splits "
            f"text; {_OF_ANOTHER}"
        )
    writer = gguf.GGUFWriter(None, "")
    writer.add_tokenizer_model("gpt2" if bytewise else "llama")
    writer.add_tokenizer_pre(pre)
    texts, types = _tokens(data, rows, folder)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if not bytewise:
        writer.add_token_scores(_scores(data, texts))
        writer.add_add_space_prefix(_adds_space(data))
    with quiet("gguf"):
        special = _Special(folder, load_merges=bytewise, n_vocab=rows)
        special.add_to_gguf(writer, quiet=True)
    return {key: value for key, value in writer.kv_data[0].items() if key.startswith(_OURS)}


def copy_tokenizer(file: Path, rows: int) -> dict[str, gguf.GGUFValue]:
    """Return the same keys of a GGUF file; UserError if it has another number of tokens."""
    fields = gguf.GGUFReader(file).fields
    found = {
        key: gguf.GGUFValue(one.contents(), one.types[0], one.types[1] if one.types[1:] else None)
        for key, one in fields.items()
        if key.startswith(_OURS)
    }
    tokens = len(found["tokenizer.ggml.tokens"].value) if "tokenizer.ggml.tokens" in found else 0
    if tokens != rows:
        raise UserError(
            f"the tokenizer in {file} has {tokens:,} tokens, and the model has {rows:,}; name a "
            "GGUF file of the model that it was made of"
        )
    return found


def _tokens(data: dict[str, Any], rows: int, folder: Path) -> tuple[list[str], list[int]]:
    """Return text and type of each token; rows that no token has are unused ones."""
    vocabulary = {number: text for text, number in data["model"]["vocab"].items()}
    added = {one["id"]: one for one in data.get("added_tokens") or ()}
    most = max((*vocabulary, *added), default=-1)
    if most >= rows:
        raise UserError(
            f"the tokenizer in {folder} has tokens up to {most:,}, and the model embeds {rows:,}; "
            "put the tokenizer of the model into the folder"
        )
    texts, types = [], []
    for number in range(rows):
        text, kind = vocabulary.get(number), gguf.TokenType.NORMAL
        if number in added:
            text, special = added[number]["content"], added[number].get("special")
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        elif text is None:
            text, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif re.fullmatch("<0x[0-9A-F]{2}>", text) and data["model"].get("byte_fallback"):
            kind = gguf.TokenType.BYTE
        if text == data["model"].get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        texts.append(text)
        types.append(kind)
    return texts, types


def _scores(data: dict[str, Any], texts: list[str]) -> list[float]:
    """Return a score for each token: what is merged first has the highest one."""
    pairs = (one.split(" ", 1) if isinstance(one, str) else one for one in data["model"]["merges"])
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(text, len(ranks))) for text in texts]


def _adds_space(data: dict[str, Any]) -> bool:
    """Whether text gets a space before its first word."""
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme") in ("always", "first")
        for step in _all_steps(data)
    )


def _marks_spaces(step: dict[str, Any]) -> bool:
    """Whether a step puts the mark of SentencePiece for a space, and does nothing else."""
    mark = {"Prepend": "prepend", "Replace": "content", "Metaspace": "replacement"}
    if step["type"] == "Replace" and step.get("pattern") != {"String": " "}:
        return False
    return step.get(mark.get(step["type"], "")) == "▁"


def _all_steps(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [*steps_of(data.get("normalizer")), *steps_of(data.get("pre_tokenizer"))]
