"""ChatGLM-6B: configuration, model and tokenizer, reading the published checkpoint.

The architecture is that of "GLM: General Language Model Pretraining with Autoregressive Blank
Infilling" (arXiv 2103.10360) as published for ChatGLM-6B. A text is read as

    context [gMASK] <sop> answer <eop>

in which the context is seen both ways, and the answer causally.

Importing this package registers it with the Auto classes of ``transformers``, in two steps. The
config is registered at once. Model and tokenizer follow when the first config is made, since the
Auto classes look them up by the type of a config. Importing them earlier could happen while
``transformers`` is half imported itself.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers.models.auto.configuration_auto import AutoConfig

from llm_pruner.models.chatglm.configuration import ChatGLMConfig

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


def register() -> None:
    """Register the config; a second call changes nothing."""
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)


@cache
def register_code() -> None:
    """Register model and tokenizer; a second call changes nothing."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from llm_pruner.models.chatglm.modeling import ChatGLMForConditionalGeneration, ChatGLMModel
    from llm_pruner.models.chatglm.tokenization import ChatGLMTokenizer

    AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)


register()
