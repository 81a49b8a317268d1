"""Hogwild! inference (arXiv 2504.06261) from scratch: several workers write into one attention cache.

The generation loop is `minihogwild.generate.Run`; it is not imported here, since that module is also the command.
"""

from .attention import Plan
from .cache import Cache
from .config import Config, InputError, Layer, Rope, Weights
from .load import Model, load
from .model import forward, step
from .sampling import Sampling, sample

__all__ = [
    "Cache", "Config", "InputError", "Layer", "Model", "Plan", "Rope", "Sampling", "Weights",
    "forward", "load", "sample", "step",
]  # fmt: skip
