"""A model with fewer tokens: which ones stay, what that costs, and whether it is the same model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llm_pruner.checkpoints import save_checkpoint
from llm_pruner.commands.prune_start import check_space
from llm_pruner.data.sequences import bare_ids, template_ids
from llm_pruner.data.text import Documents, EvaluationText, load_documents, read_each
from llm_pruner.data.vocabulary import Ids, Vocabulary, vocabulary_of
from llm_pruner.errors import UserError, VerificationError
from llm_pruner.evaluation.perplexity import perplexity
from llm_pruner.files.outputs import check_output, write_output
from llm_pruner.models.checkpoint_files import records_of
from llm_pruner.models.forward import embedding_rows, maximum_length
from llm_pruner.models.gguf_file import drop_tokens_beyond_
from llm_pruner.models.load import LoadedModel, load, load_tokenizer
from llm_pruner.report.records import Change
from llm_pruner.report.write import write_request
from llm_pruner.runtime.precision import exact_products
from llm_pruner.runtime.processes import only_one
from llm_pruner.runtime.progress import track
from llm_pruner.settings.evaluate import PerplexitySettings
from llm_pruner.settings.vocab import VocabSettings
from llm_pruner.surgery.verify import largest_difference, tolerance
from llm_pruner.surgery.vocabulary import check_tables, cut_vocabulary_, named_tokens
from llm_pruner.types import Edits

RECORD = "vocabulary.json"
_OF_FOLDER = ("bytes", "saved_as", "needs")
"""What it does not say, since it is written before that is known, and copied by ``compress``."""
HELD_OUT = 10
"""One part in so many of the text is not counted; what a token less costs is measured on it."""
MEASURED = 50_000
"""Characters that it is measured on, at most."""
LEAST = 200
"""Characters that it is measured on, at least."""
COMPARED, WINDOW = 256, 1024
"""Tokens on which the two models are compared, and in which their loss is measured, at most."""


@dataclass(frozen=True)
class Trimmed:
    """A model with fewer tokens. What changed is measured on a part of the text that was not read.

    Attributes:
        bits_per_byte: mean loss over the bytes of the text, which does not depend on its tokens.
        difference: largest absolute difference of logits of tokens that stayed.
        kept: the old ids of the tokens, in the order of their new ones.
    """

    model: str
    tokens: Change[int]
    parameters: Change[int]
    bits_per_byte: Change[float]
    tokens_per_kilobyte: Change[float]
    difference: float
    kept: list[int]
    path: Path
    bytes: int = 0
    saved_as: str = "stock"
    needs: tuple[str, ...] = ()


def vocab(settings: VocabSettings) -> Trimmed:
    """Save a model without the tokens that a text does not need.

    Raises UserError where that cannot be, VerificationError where the smaller model gives other
    logits; nothing is written.
    """
    only_one("vocab")
    check_output(settings.out, settings.overwrite, settings.reads)
    check_space(settings.out, settings.loading())
    tokenizer = load_tokenizer(settings.loading())
    read, apart = _texts(settings)
    loaded = load(settings.loading(), tokenizer=tokenizer)
    model, rows = loaded.model, embedding_rows(loaded.model)
    known = _known(loaded, settings)
    counts = known.count(track(read, "tokens of texts"))
    kept = known.choose(counts, settings.size)
    smaller = known.cut(kept)
    _require_same_text(tokenizer, smaller, apart)
    before = _measured(loaded, tokenizer, apart)
    difference, parameters, edits = _cut_(model, smaller, kept, apart)
    after = _measured(loaded, smaller, apart)
    found = Trimmed(
        model=loaded.name,
        tokens=Change(rows, embedding_rows(model)),
        parameters=parameters,
        bits_per_byte=Change(before[0], after[0]),
        tokens_per_kilobyte=Change(before[1], after[1]),
        difference=difference,
        kept=kept.tolist(),
        path=settings.out,
    )
    return _save(found, settings, loaded, smaller, apart, edits)


def _known(loaded: LoadedModel, settings: VocabSettings) -> Vocabulary:
    """Return what the tokenizer knows; UserError for a model or size that cannot be."""
    model, tokenizer = loaded.model, loaded.tokenizer
    assert tokenizer is not None
    check_tables(model)
    rows = embedding_rows(model)
    drop_tokens_beyond_(tokenizer, rows)  # no text can have them that the model reads
    known = vocabulary_of(tokenizer, named_tokens(model) | template_ids(tokenizer))
    if known.size > rows:
        raise UserError(
            f"the tokenizer of {settings.model} has the token {known.size - 1}, and the embedding "
            f"has {rows} rows; give the tokenizer that belongs to the model"
        )
    known.check(settings.size)
    return known


def _texts(settings: VocabSettings) -> tuple[list[str], str]:
    """Return the texts whose tokens are counted, and a text that is apart.

    Of a source with few documents it is the end of the last one.
    """

    def documents(source: str, text_field: str | None) -> Documents:
        how: Any = {"split": settings.text_split, "limit": settings.documents}
        return load_documents(source, text_field=text_field, **how)

    read: list[str] = []
    apart: list[str] = []
    for found in read_each(documents, settings.text, settings.text_field).values():
        texts: Sequence[str] = found.texts
        if len(texts) < 2 * HELD_OUT:
            whole = "\n\n".join(texts)
            cut = len(whole) - len(whole) // HELD_OUT
            texts, rest = [whole[:cut]], [whole[cut:]]
        else:
            rest = [*texts[::HELD_OUT]]
            texts = [text for number, text in enumerate(texts) if number % HELD_OUT]
        read += texts
        apart.append("\n\n".join(rest)[: MEASURED // len(settings.text)])
    held_out = "\n\n".join(apart)
    if len(held_out) < LEAST:
        raise UserError(
            f"{', '.join(settings.text)} leaves {len(held_out)} characters to measure on, a tenth "
            f"of all, and {LEAST} are needed; give more text"
        )
    return read, held_out


def _require_same_text(dense: Any, smaller: Any, text: str) -> None:
    """Raise UserError if a text is not read back from its tokens as it was with all of them."""
    before, after = (one.decode(bare_ids(one, text)) for one in (dense, smaller))
    if before != after:
        raise UserError(
            "with fewer tokens the tokenizer does not give back the text kept apart, so tokens "
            "cannot be taken from it; nothing was written"
        )


def _measured(loaded: LoadedModel, tokenizer: Any, text: str) -> tuple[float, float]:
    """Return the bits per byte of a text by a model with a tokenizer, and tokens per kilobyte."""
    size, ids = len(text.encode()), len(bare_ids(tokenizer, text))
    window = min(WINDOW, maximum_length(loaded.model) or WINDOW, ids)
    how = PerplexitySettings(seq_len=window)
    found = perplexity(loaded.model, tokenizer, EvaluationText("text apart", None, text), how)
    return found.nll / math.log(2) * ids / size, 1000 * ids / size


@torch.no_grad()
@exact_products()
def _cut_(model: Any, smaller: Any, kept: Ids, text: str) -> tuple[float, Change[int], Edits]:
    """Cut the model; return how much its logits differ, its parameters before and after, edits."""
    length = min(COMPARED, maximum_length(model) or COMPARED)
    ids = torch.tensor(bare_ids(smaller, text)[:length], device="cpu")[None].to(model.device)
    rows = torch.from_numpy(kept).to(model.device)
    size = model.num_parameters()
    expected = model(rows[ids]).logits[..., rows]
    edits = cut_vocabulary_(model, kept)
    found = model(ids).logits
    difference = largest_difference([expected], [found])
    if not difference <= tolerance([expected], model, ids.shape[1]):
        raise VerificationError(
            f"with fewer tokens the model gives logits that differ by {difference:.3g}; nothing "
            "was written; please report the model"
        )
    return difference, Change(size, model.num_parameters()), edits


def _save(
    found: Trimmed,
    settings: VocabSettings,
    loaded: LoadedModel,
    tokenizer: Any,
    text: str,
    edits: Edits,
) -> Trimmed:
    expected = bare_ids(tokenizer, text)

    def beside(folder: Path, *_: Any) -> None:
        for stale in folder.glob("*.model"):  # of a library that this one is not read from
            stale.unlink()
        write_request(folder, settings)
        record = {name: said for name, said in asdict(found).items() if name not in _OF_FOLDER}
        write_output(folder / RECORD, json.dumps(record, default=str) + "\n")

    def check(folder: Path) -> None:
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
        if bare_ids(again, text) != expected:
            raise UserError(
                f"a {type(again).__name__} is not read from its file alone, so tokens cannot be "
                "taken from it; nothing was written"
            )

    plan = records_of(settings.model, loaded.revision) / "plan.json"
    saved = save_checkpoint(
        loaded.model,
        settings.out,
        edits=edits,
        plan_json=plan.read_text(encoding="utf-8") if plan.is_file() else None,
        tokenizer=tokenizer,
        processor=loaded.processor,
        overwrite=settings.overwrite,
        max_shard_size=settings.max_shard_size,
        beside=beside,
        check=check,
    )
    return replace(found, bytes=saved.bytes, saved_as=saved.kind, needs=saved.needs)
