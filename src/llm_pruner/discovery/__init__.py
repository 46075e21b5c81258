"""Which weights must be removed together."""
