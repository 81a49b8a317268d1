"""Hogwild! inference (arXiv 2504.06261) from scratch: several workers write into one attention cache.

Each name below is imported when it is first asked for. So `import minihogwild` costs nothing, and a command can speak,
or be interrupted, before PyTorch has been loaded.
"""

import os
import sys
from importlib import import_module

# `python -m minihogwild...` looks for every module in the current folder first, which stands at the head of the path.
# That may be a model's, and what lies there is a stranger's: it is not looked into, unless the package is there itself.
# (While Python looks for the module to run, "-m" stands where its path will be.)
_is_run = sys.argv[:1] == ["-m"] and any(argument.startswith("minihogwild") for argument in sys.orig_argv)
_starts_with_current_folder = not getattr(sys.flags, "safe_path", sys.flags.isolated)
if _is_run and _starts_with_current_folder and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

# What the package offers, and the module that it comes from
_MODULES = {
    "Cache": "cache",
    "Config": "config",
    "InputError": "errors",
    "Layer": "weights",
    "LayerKind": "config",
    "Model": "hub",
    "Plan": "attention",
    "Rope": "config",
    "Run": "workers",
    "Sampling": "sampling",
    "Weights": "weights",
    "forward": "model",
    "load": "hub",
    "sample": "sampling",
    "step": "model",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
