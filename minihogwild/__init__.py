"""Hogwild! inference (arXiv 2504.06261) from scratch: several workers write into one attention cache.

Each name below is imported when it is first asked for. So `import minihogwild` costs nothing, and a command can speak,
or be interrupted, before PyTorch has been loaded.
"""

import os
import sys
from importlib import import_module


def _is_here(folder: str) -> bool:
    return os.path.isdir(folder) and os.path.samefile(folder, ".")


# Has `python -m minihogwild...` just begun? Then Python has not yet put the module's path in the place of this "-m".
if sys.argv[:1] == ["-m"] and any("minihogwild." in argument for argument in sys.orig_argv):
    # Python looks for every module in the current folder first. That may be a model's, and what lies there is a
    # stranger's: it is not looked into, unless it is the folder that the package itself is in.
    if not _is_here(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
        sys.path = [folder for folder in sys.path if not _is_here(folder)]
    import_module(".interrupts", __name__).end_at_once()  # PyTorch, imported next, takes more than a second

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


def command() -> int:
    """What is installed as `minihogwild`."""
    import_module(".interrupts", __name__).end_at_once()  # as above
    return import_module(".generate", __name__).main()
