"""Perplexity, size, speed and sample continuations of a model."""
