"""The version of the package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("llm-pruner")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"
