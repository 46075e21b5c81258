"""Each module here is a format of ``export``: ``TYPES``, ``require`` and ``convert``."""
