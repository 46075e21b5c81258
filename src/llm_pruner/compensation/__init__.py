"""Closed-form repair after the cut: consumers come nearer to what the dense model computes."""

from llm_pruner.compensation.least_squares import RIDGES
from llm_pruner.compensation.refit import Refitted, held_out_samples, refit_

__all__ = ["RIDGES", "Refitted", "held_out_samples", "refit_"]
