"""llama.cpp by its own library, for what benchmarks compare: tokens, logits, greedy text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

FFI, LIB = get_ffi(), get_lib()
_ERROR = 4


@FFI.callback("void(enum ggml_log_level, const char*, void*)")
def _log(level: int, text: object, _: object) -> None:
    if level == _ERROR:
        print(FFI.string(text).decode(errors="replace"), end="", flush=True)


class Llama:
    """A GGUF file, computed exactly: float32 keys and values, no flash attention.

    Args:
        file: the GGUF file.
        context: the most tokens.
    """

    def __init__(self, file: Path, context: int = 512) -> None:
        LIB.llama_log_set(_log, FFI.NULL)
        LIB.llama_backend_init()
        how = LIB.llama_model_default_params()
        how.n_gpu_layers = 0
        self._model = LIB.llama_model_load_from_file(str(file).encode(), how)
        if self._model == FFI.NULL:
            raise RuntimeError(f"llama.cpp does not load {file}")
        run = LIB.llama_context_default_params()
        run.n_ctx = run.n_batch = run.n_ubatch = context
        run.n_threads = run.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", 2))
        run.type_k = run.type_v = run.flash_attn_type = 0
        self._context = LIB.llama_init_from_model(self._model, run)
        if self._context == FFI.NULL:
            raise RuntimeError(f"llama.cpp does not run {file}")
        self._vocab = LIB.llama_model_get_vocab(self._model)
        self.tokens = LIB.llama_vocab_n_tokens(self._vocab)

    def close(self) -> None:
        """Give the memory back."""
        LIB.llama_free(self._context)
        LIB.llama_model_free(self._model)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the tokens of a text, with those that the model wants around it."""
        data = text.encode()
        room = FFI.new("llama_token[]", len(data) + 8)
        count = LIB.llama_tokenize(self._vocab, data, len(data), room, len(data) + 8, True, special)
        return list(room[0:count])

    def logits(self, ids: Sequence[int], past: int = 0) -> np.ndarray:
        """Return logits after each token, shape (tokens, vocabulary)."""
        if past == 0:
            LIB.llama_memory_clear(LIB.llama_get_memory(self._context), True)
        batch = LIB.llama_batch_init(len(ids), 0, 1)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, past + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        batch.n_tokens = len(ids)
        code = LIB.llama_decode(self._context, batch)
        LIB.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = (LIB.llama_get_logits_ith(self._context, place) for place in range(len(ids)))
        size = self.tokens * 4
        return np.stack([np.frombuffer(FFI.buffer(row, size), np.float32).copy() for row in rows])

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the likeliest tokens after a prompt."""
        found = [int(self.logits(ids)[-1].argmax())]
        while len(found) < count:
            row = self.logits(found[-1:], len(ids) + len(found) - 1)[-1]
            found.append(int(row.argmax()))
        return found
