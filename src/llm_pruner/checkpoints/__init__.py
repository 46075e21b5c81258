"""Saving and loading of pruned models; importing it registers the hook that loads them."""

from llm_pruner.checkpoints.save import SavedCheckpoint, save_checkpoint
from llm_pruner.checkpoints.stock_config import stock_config

__all__ = ["SavedCheckpoint", "save_checkpoint", "stock_config"]
