"""Retort: a bench for reasoning distillation.

from harness import compare
summary = compare("quickstart", methods=["sft"], seeds=1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.compare import compare as compare

__all__ = ["compare"]


class RetortWarning(UserWarning):
    """Something a user should know about and that does not stop the run."""


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line and `import harness.types` load no tensor library.
    if name == "compare":
        import importlib

        return importlib.import_module("harness.compare")  # a module that can be called
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
