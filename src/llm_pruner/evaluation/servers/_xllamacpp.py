"""Runs llama.cpp's server out of xllamacpp, with options as llama-server has them.

A script that runs in another Python; it imports nothing but that and Python's own library.
"""

from __future__ import annotations

import argparse
import signal


def main() -> None:
    """Serve a file until a signal ends this process."""
    import xllamacpp

    parser = argparse.ArgumentParser()
    for name in ("model", "host"):
        parser.add_argument(f"--{name}")
    for name in ("port", "ctx-size", "parallel"):
        parser.add_argument(f"--{name}", type=int)
    asked = parser.parse_args()
    settings = xllamacpp.CommonParams()
    settings.model.path = asked.model
    settings.hostnames, settings.port = [asked.host], asked.port
    settings.n_ctx, settings.n_parallel = asked.ctx_size, asked.parallel
    settings.offline, settings.ui = True, False
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
