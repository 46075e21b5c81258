"""ChatGLM-6B: configuration, model and tokenizer, reading the published checkpoint.

The architecture is that of "GLM: General Language Model Pretraining with Autoregressive Blank
Infilling" (arXiv 2103.10360) as published for ChatGLM-6B. A text is read as

    context [gMASK] <sop> answer <eop>

in which the context is seen both ways, and the answer causally. No model of ``transformers`` fits
these weights: its ``glm`` models have another block, other norms and a causal mask.

Importing this package registers it with the Auto classes of ``transformers``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from llm_pruner.models.chatglm.configuration import ChatGLMConfig
from llm_pruner.models.chatglm.modeling import ChatGLMForConditionalGeneration, ChatGLMModel
from llm_pruner.models.chatglm.tokenization import ChatGLMTokenizer

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "register",
]


def register() -> None:
    """Register configuration, model and tokenizer; a second call changes nothing."""
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)


register()
