"""Tokenizer of ChatGLM-6B, on its published SentencePiece model.

The pieces include the special tokens ([MASK], [gMASK], [sMASK], ``<unused_0>``, ``<sop>`` and
``<eop>``, from 130000 on in the published file) and stand-ins for whitespace that SentencePiece
would lose: ``<n>`` for a new line, ``<|tab|>`` for a tab, ``<|blank_2|>`` to ``<|blank_80|>`` for
as many spaces.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llm_pruner.errors import UserError

_PIECES = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "mask_token": "[MASK]",
    "gmask_token": "[gMASK]",
    "pad_token": "<pad>",
}
_TOKENS = _PIECES | {"end_token": "</s>", "unk_token": "<unk>"}
"""Names of the special tokens; those of the first table are pieces of the model's file."""

_LONGEST_BLANK = 80
_SPACES = re.compile(rf" {{2,{_LONGEST_BLANK}}}")
_BLANK = re.compile(r"<\|blank_(\d+)\|>")


class ChatGLMTokenizer(SentencePieceBackend):
    """Text to ids and back.

    A text becomes ``text [gMASK] <sop>``, to be continued by the model; a pair becomes
    ``first [gMASK] <sop> second <eop>``. Batches are padded on the left.

    Args:
        vocab_file: path of ``ice_text.model``.
        do_lower_case: lower the text before encoding.
        remove_space: collapse whitespace before encoding.
        num_image_tokens: 0; ids of older checkpoints started behind those of image tokens.

    Raises:
        UserError: the file or ``num_image_tokens`` is of another release.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "ice_text.model"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str,
        do_lower_case: bool = False,
        remove_space: bool = False,
        num_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        # The code that a published tokenizer points to is replaced by this package.
        kwargs.pop("auto_map", None)
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        super().__init__(
            vocab_file=vocab_file,
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            num_image_tokens=num_image_tokens,
            **_TOKENS | kwargs,
        )
        # A token that the file lacks would get an id for which the model may have no row.
        pieces = [str(getattr(self, name)) for name in _PIECES]
        known = all(self.sp_model.IdToPiece(self.sp_model.piece_to_id(p)) == p for p in pieces)
        if num_image_tokens or not known:
            raise UserError(
                f"{Path(vocab_file).name} is of another release than the ChatGLM-6B with 130528 "
                "tokens; use the ice_text.model that belongs to it"
            )

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = _SPACES.sub(lambda found: f"<|blank_{len(found[0])}|>", text)
        return self.sp_model.encode(text, out_type=str)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to a text, with the whitespace that stand-ins stand for."""
        text = self.sp_model.decode([token for token in tokens if token != self.pad_token])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return _BLANK.sub(_spaces, text)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return ``first [gMASK] <sop>``, and ``second <eop>`` behind it for a pair."""
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]


def _spaces(blank: re.Match[str]) -> str:
    count = int(blank[1])
    return " " * count if 2 <= count <= _LONGEST_BLANK else blank[0]
