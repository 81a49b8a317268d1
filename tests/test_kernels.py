"""The Triton kernels are the oracle's too: by Triton's interpreter, without a GPU, in float32 (it has no bfloat16)."""

import os

import pytest
import torch
import util
from hypothesis import given, settings
from hypothesis import strategies as st
from util import WatchedOracle, configs, random_weights, relative_difference, run, schedules

if torch.cuda.is_available():
    pytest.skip("test_cuda.py does it in earnest", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="needs: python -m pip install triton 'numpy<2.4'")
from minihogwild import kernels


@pytest.mark.filterwarnings("ignore:Conversion of an array", "ignore:divide by zero")  # an empty share's log2(0)
@settings(max_examples=25)
@given(configs(), schedules(), st.booleans(), st.integers(0, 99))
def test_attention_equals_the_oracle(shape, schedule, qk_norms, seed):
    """Three programs share what 256 do on a GPU: so each has pages to go through."""
    weights, (blocks, events) = random_weights(shape, torch.float32, seed, False, qk_norms), schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PROGRAMS", 3 * shape.num_key_value_heads)
        engine = util.Engine(shape, weights, blocks, static=True)
        engine.cache.ops = kernels
        ours = list(run(engine, events))
    oracle = WatchedOracle(shape, weights, blocks)
    theirs = list(run(oracle, events))
    if oracle.narrowest > 2e-3:
        assert max(relative_difference(a, b) for a, b in zip(ours, theirs)) <= 2e-4
