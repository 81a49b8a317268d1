"""What the formats' own writers make of a matrix is what our statement of each format (packed_files.py) makes of it.

compressed-tensors is installed with the test packages. AutoAWQ and AutoGPTQ bring kernels that cannot be built on every
machine: of them a few files are downloaded from the package index, and only what packs is run.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import packed_files
import pytest
import torch
from packed_files import Numbers, draw

N, E, GROUP = 64, 96, 32


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    for options in (
        ["--no-binary", ":all:", "--no-build-isolation", "autoawq==0.2.9"],
        ["--only-binary", ":all:", "--python-version", "3.11", "auto-gptq==0.7.1"],
    ):
        done = subprocess.run([*pip, *options], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            pytest.skip(f"not to be downloaded: {done.stderr.strip().splitlines()[-1]}")
    return folder


def load_module(name: str, source: str, folder: Path) -> types.ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def linear_of(numbers: Numbers) -> torch.nn.Linear:
    linear = torch.nn.Linear(E, N, bias=False)
    linear.weight.data = numbers.meant().float()
    return linear


@pytest.mark.slow
def test_autoawq(packages, tmp_path, monkeypatch):
    with tarfile.open(next(packages.glob("autoawq*.tar.gz"))) as archive:
        name = next(name for name in archive.getnames() if name.endswith("awq/modules/linear/gemm.py"))
        source = archive.extractfile(name).read().decode()
    stubs = {
        "awq.utils.module": {"try_import": lambda name: (None, "")},
        "awq.utils.utils": {"get_best_device": lambda: "cpu"},
        "awq.utils.packing_utils": {"dequantize_gemm": None},
    }
    for name, contents in stubs.items():
        stub = types.ModuleType(name)
        vars(stub).update(contents)
        monkeypatch.setitem(sys.modules, name, stub)
    writer = load_module("awq_gemm", source, tmp_path).WQLinear_GEMM
    numbers = draw(N, E, GROUP, np.random.default_rng(0), torch.float16, symmetric=False)
    zeros = torch.from_numpy(numbers.zero).float()
    made = writer.from_linear(linear_of(numbers), 4, GROUP, scales=numbers.scale.float(), zeros=zeros)
    for name, tensor in packed_files.awq(numbers).items():
        assert torch.equal(getattr(made, name), tensor), name


@pytest.mark.slow
def test_autogptq(packages, tmp_path):
    with zipfile.ZipFile(next(packages.glob("auto_gptq*.whl"))) as archive:
        source = archive.read("auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py").decode()
    writer = load_module("gptq_old", source, tmp_path).QuantLinear
    numbers = draw(N, E, GROUP, np.random.default_rng(0), torch.float32, symmetric=False)
    numbers.zero = numbers.zero.clip(1)  # it cannot write a zero point of 0: less one, that spoils the whole word
    made = writer(4, GROUP, E, N, bias=False)
    zeros = torch.from_numpy(numbers.zero).float().T.contiguous()
    made.pack(linear_of(numbers), numbers.scale.T.contiguous(), zeros, None)
    for name, tensor in packed_files.gptq(numbers).items():
        if name != "g_idx":  # it is one for the whole model there
            assert torch.equal(getattr(made, name), tensor), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_compressed_tensors(symmetric, group):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    numbers = draw(N, E, group, np.random.default_rng(0), torch.float32, symmetric)
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {"weight": numbers.meant().float(), "weight_scale": numbers.scale.T.contiguous()}
    state["weight_zero_point"] = torch.from_numpy(numbers.zero.T - 8).to(torch.int8).contiguous()
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    ours = packed_files.compressed_tensors(numbers, symmetric)
    assert set(ours) <= set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name
    assert ("weight_zero_point" in theirs) == ("weight_zero_point" in ours)
