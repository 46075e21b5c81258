"""The sweep of models that the project has not seen: see ``benchmarks/unseen.py``."""
