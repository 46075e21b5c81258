"""Removal of units, and the proof that it was right."""
