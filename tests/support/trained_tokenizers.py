"""Trained tokenizers of the kinds that models have, made in a moment from the demo text."""

from __future__ import annotations

import json

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from llm_pruner.data.text import demo_text

SPECIAL = ["<unk>", "<s>", "</s>"]
STRANGE = "naïve Ωmega 語 🦙\t\n  x == y;"


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As those of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([demo_text()], trainer)
    return wrapped(tokenizer)


def with_bytes() -> PreTrainedTokenizerFast:
    """As that of Llama 2: characters, and bytes for those that it does not know; a space before
    each text, and none before what is decoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([demo_text()], trainer)
    data = json.loads(tokenizer.to_str())
    data["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    data["added_tokens"] = data["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=sorted(set(STRANGE.replace(" ", "▁"))),
        show_progress=False,
    )
    tokenizer.train_from_iterator([demo_text()], trainer)
    return wrapped(tokenizer)


MADE = {"byte level": byte_level, "with bytes": with_bytes, "unigram": unigram}
