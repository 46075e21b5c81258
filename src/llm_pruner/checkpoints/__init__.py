"""Saving and loading of pruned models; importing it registers the hook that loads them."""

from llm_pruner.checkpoints.atomic import atomic_directory, atomic_write_text, check_output
from llm_pruner.checkpoints.quantizer import PrunedConfig, PrunedQuantizer
from llm_pruner.checkpoints.save import SavedCheckpoint, save_checkpoint
from llm_pruner.checkpoints.stock import stock_config

__all__ = [
    "PrunedConfig",
    "PrunedQuantizer",
    "SavedCheckpoint",
    "atomic_directory",
    "atomic_write_text",
    "check_output",
    "save_checkpoint",
    "stock_config",
]
