"""The machine: memory, precision, signals, time. Nothing here knows a model."""
