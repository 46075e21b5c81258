"""Faster arithmetic for training, each part with a switch of its own."""
