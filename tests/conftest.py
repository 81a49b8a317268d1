"""What all tests share. `python -m pytest` runs the fast ones, `python -m pytest -m ""` all of them.

Properties are tried with the same examples each time, so that a failure comes back when the test is run again. Other
examples, ten times as many, each time new: `HYPOTHESIS_PROFILE=nightly python -m pytest -m ""`. A failure prints what
brings it back.
"""

import os
from pathlib import Path

import hypothesis
import pytest
import smollm2
import tiny
import torch
from hypothesis_profile import PROFILE
from packaged import Unavailable

from minihogwild import Model

# No deadline: a first, cold example may be slow
hypothesis.settings.register_profile("minihogwild", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None, print_blob=True, derandomize=False, max_examples=1000)
hypothesis.settings.load_profile(PROFILE)

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]
torch.set_num_threads(1)  # small tensors: more threads only wait for each other
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test or library does it first


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Model:
    """A few thousand random weights, and a token for each byte."""
    return tiny.load_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct; skips where it is neither kept from an earlier run nor to be downloaded."""
    try:
        return smollm2.folder()
    except Unavailable as error:
        pytest.skip(f"no SmolLM2 to test with: {error}")
