"""Hogwild! inference (arXiv 2504.06261) from scratch: several workers write into one attention cache.

Each name below is imported when it is first asked for. So `import minihogwild` costs nothing, and a command can speak,
or be interrupted, before PyTorch has been loaded.
"""

import os
import sys
from importlib import import_module

# `python -m minihogwild...` looks for every module in the current folder first. That may be a model's, and what lies
# there is a stranger's: it is not looked into, unless it is the folder that the package itself is in.
if " -m minihogwild" in " ".join(sys.orig_argv):
    _package = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.getcwd()) != os.path.dirname(_package):
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
