"""Calibration and evaluation text: a local file, a hub dataset, or text the model writes itself."""
