"""All kernels compile for the GPUs in use, and none spills registers. This needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

LAUNCHES = {
    "sparse_triton": """
    module._sums.configs, module._dots.configs = module.SUMS[3:4], module.DOTS[-1:]  # those with most registers
    offsets, indices, x = torch.tensor([0, 500]), torch.zeros(500, dtype=torch.int64), torch.zeros(500, 64, dtype=dtype)
    module.weighted_sums(offsets, indices, x[:, 0], x)
    module.dot_products(offsets, indices, x[:1], x)
    """,
    "fixed_selection_triton": """
    sizes = [(32, 1024), (1, 1)] if dtype == torch.bfloat16 else [(32, 1024)]  # to the compiler 1 is a constant
    for h in (torch.zeros(size, dtype=dtype) for size in sizes):
        module.top_of_batch(h, 4 * len(h), torch.zeros(()), 0.5)
        module.top_of_rows(h, 4)
    """,
    "adam_triton": """
    if dtype != torch.float32:
        return
    one, entries = torch.ones(()), torch.zeros(200, dtype=torch.int64)
    for d, decoupled, unit_norm, with_copy in ((768, False, True, 0), (2304, False, False, 0), (9216, True, True, 1)):
        W = torch.zeros(3, d)
        gradient, copy = (torch.tensor([0, 5, 7, 150]), entries, torch.zeros(200), torch.zeros(2, d)), W.bfloat16()
        kind = decoupled, unit_norm, copy if with_copy else None
        module.adam_step(W, W.clone(), W.clone(), *gradient, one, one, (0.9, 0.99), 1e-8, 0.1, *kind)
    """,
}
"""Calls that launch every kernel of a module, for tensors of a dtype."""

SCRIPT = """
import torch
from compiling import compile_only, launched_kernels
from sae_lab.ops import {module} as module

def launch(dtype):
    {launches}

for capability, dtypes in {targets}:
    with compile_only(capability) as compiled:
        for dtype in dtypes:
            launch(dtype)
    assert compiled.keys() == launched_kernels(module), compiled.keys() ^ launched_kernels(module)
    print(capability, *compiled)
"""
TARGETS = """(
    (80, [torch.float32]),  # A100
    (90, [torch.float32, torch.bfloat16, torch.float16]),  # H100, H200
    (100, [torch.float32]),  # B200
)"""


@pytest.mark.process
@pytest.mark.parametrize("module", LAUNCHES)
def test_the_kernels_compile(module, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "tests" / "ops")]))
    script = SCRIPT.format(module=module, launches=LAUNCHES[module].strip(), targets=TARGETS)
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 3
