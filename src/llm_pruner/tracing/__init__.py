"""Discovery by watching the model run: which positions of which tensors go together."""
