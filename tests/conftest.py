from pathlib import Path

import hypothesis
import pytest
import smollm2
import torch

# A failure must come back when the test is run again; and a first, cold example may be slow
hypothesis.settings.register_profile("minihogwild", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("minihogwild")

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]
torch.set_num_threads(1)  # small tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct; skips where it is neither kept from an earlier run nor to be downloaded."""
    try:
        return smollm2.folder()
    except smollm2.Unavailable as error:
        pytest.skip(f"no SmolLM2 to test with: {error}")
