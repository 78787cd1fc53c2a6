"""VAI serves many language models from memory that outlives its processes.

The public names are loaded on first use: an eager import here would drag the engine into the daemon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vai.attach import attach as attach
    from vai.llm import LLM as LLM
    from vai.llm import GrammarSpec as GrammarSpec
    from vai.request import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "GrammarSpec", "SamplingParams", "attach"]

_HOMES = {"LLM": "vai.llm", "GrammarSpec": "vai.llm", "SamplingParams": "vai.request", "attach": "vai.attach"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vai' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
