"""Evaluation text: records joined the way the literature joins them."""

from __future__ import annotations

from llm_pruner.data.demo_text import demo_text
from llm_pruner.data.records import Protocol, join_records, record_format
from llm_pruner.data.text import load_documents

DEMO = "demo"
"""The source name of the text that this package ships."""

_SPLITS = {"wikitext2": "test", "c4": "validation", "bookcorpus": "train"}
_C4_DOCUMENTS = 1100  # what GPTQ and SparseGPT join for their C4 figures


def load_evaluation_text(
    source: str,
    *,
    protocol: Protocol = "standard",
    split: str | None = None,
    text_field: str | None = None,
) -> tuple[str, str | None, str]:
    """Return (name, split, text) of an evaluation corpus.

    How records become one text, after LLM-Pruner (``paper``) and GPTQ (``standard``):

    - WikiText: a row keeps its line end, a blank row is the empty string, rows are joined with two
      line feeds. So two paragraphs stand five line feeds apart. The raw file, with one row a
      line, gives the same text as the hub dataset.
    - Penn Treebank: the rows lose their outer spaces and are joined with two line feeds
      (``paper``, which reads the validation split) or a space (``standard``, test split).
    - any other ``.txt`` file is taken as it is.
    - other documents are joined with two line feeds; of C4, the first 1,100 of the validation
      split.

    WikiText and Penn Treebank are known by their look, so a local file works under any name.

    Args:
        source: ``demo`` for the text that this package ships; else as for ``load_documents``.
        split: split of a hub dataset; by default the one that the protocol reads, else ``test``.

    Raises:
        UserError: as ``load_documents``.
    """
    if source == DEMO:
        return "demo text", None, demo_text()
    alias = source.partition(":")[0]
    usual = ("validation" if protocol == "paper" else "test") if alias == "ptb" else None
    chosen = split or usual or _SPLITS.get(alias, "test")
    limit = {"c4": _C4_DOCUMENTS, "bookcorpus": 10_000}.get(alias)
    documents = load_documents(source, split=chosen, text_field=text_field, limit=limit)
    form = record_format(documents.records)
    text = documents.raw if form is None else join_records(documents.records, form, protocol)
    return documents.name, documents.split, text
