import hypothesis
import pytest
import torch

# A failure must come back when the test is run again; and a first, cold example may be slow
hypothesis.settings.register_profile("minihogwild", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("minihogwild")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
