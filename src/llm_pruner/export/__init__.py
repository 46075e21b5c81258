"""Models as files of other programs: a format is a file in ``formats``, found by its name."""
