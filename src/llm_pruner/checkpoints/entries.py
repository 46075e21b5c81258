"""What stands in a config, and the models without weights that changed values give."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from transformers import PreTrainedConfig, PreTrainedModel

from llm_pruner.checkpoints.meta import Sizes, build_meta, set_path, sizes


def entries(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of a config and, if it nests one, of its text model's config."""
    for prefix, level in levels(config):
        for name, value in level.to_dict().items():
            if not name.startswith("_") and hasattr(level, name):
                yield prefix + name, value


def levels(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield the config and, if it nests one, the config of its text model, with path prefixes."""
    yield "", config
    text = config.get_text_config(decoder=True)
    for name in vars(config):
        if text is not config and getattr(config, name, None) is text:
            yield f"{name}.", text


def with_values(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of the config with the values at these dotted paths; nothing is validated."""
    changed = copy.deepcopy(config)
    for path, value in values.items():
        set_path(changed, path, value)
    return changed


def try_sizes(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, values: Mapping[str, Any]
) -> Sizes | None:
    """Return the sizes of the model that the changed config builds, or None if it builds none."""
    try:
        return sizes(build_meta(model_class, with_values(config, values)))
    except Exception:  # a model may refuse values in any way; then they show nothing
        return None


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a config value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
