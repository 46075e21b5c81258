"""Makes ChatGLM-6B known to the Auto classes of ``transformers``, in two steps.

The config is registered at once. Model and tokenizer follow when the first config is made, since
the Auto classes look them up by the type of a config. Importing them earlier could happen while
``transformers`` is half imported itself.
"""

from __future__ import annotations

from functools import cache

from transformers.models.auto.configuration_auto import AutoConfig

from llm_pruner.models.chatglm.configuration import ChatGLMConfig


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
