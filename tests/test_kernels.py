"""The Triton kernels are the oracle's too: by Triton's interpreter, without a GPU, in float32 (it has no bfloat16)."""

import os
from types import SimpleNamespace

import pytest
import torch
import util
from hypothesis import example, given, settings
from hypothesis import strategies as st
from util import WatchedOracle, config, configs, random_weights, relative_difference, run, schedules, step

if torch.cuda.is_available():
    pytest.skip("test_cuda.py does it in earnest", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="needs: python -m pip install triton 'numpy<2.4'")
from minihogwild import kernels

BEHIND = [step((["a"], [*range(9)] * 8)), {"do": "move", "from": "a", "to": "b"}, step((["b"], [*range(9)] * 8))]


def flash_where_it_can(q, keys, values, plan, sight, scale):
    """In float32 and for few rows too, where the engine has no use for it."""
    return (kernels.flash if plan.only else kernels.attend)(q, keys, values, plan, sight, scale)


@pytest.mark.parametrize("attend", [kernels.attend, flash_where_it_can])
@pytest.mark.filterwarnings("ignore:Conversion of an array", "ignore:divide by zero")  # an empty share's log2(0)
@settings(max_examples=20)
@example(config("llama3", heads=6, kv_heads=2), (["a", "b"], BEHIND), True, 0)  # a block whose pages are not in order
@given(configs(), schedules(), st.booleans(), st.integers(0, 99))
def test_attention_equals_the_oracle(attend, shape, schedule, qk_norms, seed):
    """Three programs share what 256 do on a GPU: so each has pages to go through."""
    weights, (blocks, events) = random_weights(shape, torch.float32, seed, False, qk_norms), schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PROGRAMS", 3 * shape.num_key_value_heads)
        engine = util.Engine(shape, weights, blocks, static=True)
        engine.cache.ops = SimpleNamespace(linear=kernels.linear, attend=attend)
        ours = list(run(engine, events))
    oracle = WatchedOracle(shape, weights, blocks)
    theirs = list(run(oracle, events))
    if oracle.narrowest > 2e-3:
        assert max(relative_difference(a, b) for a, b in zip(ours, theirs)) <= 2e-4


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize(("T", "N", "E"), [(1, 70, 100), (3, 96, 576), (16, 130, 8300)])
def test_linear_in_float16(T, N, E):
    """The one 16-bit type that the interpreter has: short and long rows, split or not, ends that fill no tile."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float16) for shape in ((T, E), (N, E), (N,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert relative_difference(kernels.linear(x, weight, bias), exact) <= torch.finfo(torch.float16).eps
