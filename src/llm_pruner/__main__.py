"""``python -m llm_pruner`` is the command ``llm-pruner``."""

from __future__ import annotations

from llm_pruner.cli import main

if __name__ == "__main__":
    main()
