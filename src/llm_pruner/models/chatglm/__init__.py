"""ChatGLM-6B: configuration, model and tokenizer, reading the published checkpoint.

The architecture is that of "GLM: General Language Model Pretraining with Autoregressive Blank
Infilling" (arXiv 2103.10360) as published for ChatGLM-6B. A text is read as

    context [gMASK] <sop> answer <eop>

in which the context is seen both ways, and the answer causally.

Importing this package registers it with the Auto classes of ``transformers``. It is light: the code
of the model is imported when the first config of it is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm_pruner.models.chatglm.configuration import ChatGLMConfig
from llm_pruner.models.chatglm.registration import register

if TYPE_CHECKING:
    from llm_pruner.models.chatglm.modeling import ChatGLMForConditionalGeneration, ChatGLMModel
    from llm_pruner.models.chatglm.tokenization import ChatGLMTokenizer

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "register",
]

_HOMES = {
    "ChatGLMForConditionalGeneration": "modeling",
    "ChatGLMModel": "modeling",
    "ChatGLMTokenizer": "tokenization",
}
"""Public name -> the module that it comes from, which is imported at first use."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


register()
