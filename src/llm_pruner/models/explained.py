"""What went wrong while a model was loaded, in one line, whatever readers and its code raise."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import __version__

from llm_pruner.errors import UserError, in_short
from llm_pruner.files.disk import expanded
from llm_pruner.settings.options import near

_UNREAD_KINDS = (
    *("does not recognize this architecture", "not supported yet"),
    "Unrecognized model identifier",
)


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn what loading raises into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{source} does not fit into the free memory of the GPU; free some, or give another "
            "--dtype or --device cpu"
        ) from error
    except Exception as error:  # readers and remote code raise anything; all is about the input
        text = str(error)
        if "trust_remote_code" in text:
            message = (
                f"{source} brings Python code of its own, which runs only with "
                "--trust-remote-code; read the code before you allow it"
            )
        elif _is_of_own_code(error):
            message = (
                f"{source} brings code that does not run here, with transformers {__version__} "
                f"({in_short(error)}); install what it lacks, or look for a newer revision of it "
                "or one that needs no code"
            )
        elif expanded(source).suffix == ".gguf" and any(one in text for one in _UNREAD_KINDS):
            message = (
                f"{source} is of a kind that llama.cpp runs and transformers does not read; name "
                "the folder that it was made of, or run it with llama.cpp"
            )
        elif "does not recognize this architecture" in text:
            message = (
                f"{source} is of a model type that transformers {__version__} does not know; "
                "install a newer transformers"
            )
        elif "Unrecognized configuration class" in text:
            message = f"{source} is no causal language model; name one that generates text"
        elif expanded(source).exists():
            message = f"{source} cannot be loaded ({in_short(error)}); copy or download it again"
        elif "safetensors" in text:
            message = (
                f"{source} has no safetensors on the hub, and pickles are not read; "
                "name another revision or convert it"
            )
        else:
            message = (
                f"{source} is neither a local folder nor a model that can be fetched from the hub "
                f"({in_short(error)}); {near(source, ['default'])}check the name and the connection"
            )
        raise UserError(message) from error


def _is_of_own_code(error: BaseException) -> bool:
    """Whether code that comes with a model raised an error, or is none that can be imported."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    read = not isinstance(error, OSError) and any("dynamic_module_utils" in one for one in files)
    return read or any("transformers_modules" in one for one in files)
