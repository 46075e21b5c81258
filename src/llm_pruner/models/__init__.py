"""Models that ``transformers`` lacks.

Importing this package registers them with the Auto classes of ``transformers``. It is light: code
of a model is imported when the first config of it is made.
"""

from __future__ import annotations

from llm_pruner.models import chatglm

__all__ = ["chatglm"]

chatglm.register()
