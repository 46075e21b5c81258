"""Saving and loading of pruned models; importing it registers the hook that loads them."""

from llm_pruner.checkpoints.quantizer import PrunedConfig, PrunedQuantizer
from llm_pruner.checkpoints.save import SavedCheckpoint, save_checkpoint
from llm_pruner.checkpoints.stock_config import stock_config
from llm_pruner.files.outputs import atomic_directory, check_output
from llm_pruner.files.outputs import write_output as atomic_write_text

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
