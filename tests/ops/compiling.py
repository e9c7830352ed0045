"""Compile Triton kernels for GPUs that are not there: what the interpreter lets through, a compiler may not.

A kernel that needs more registers than a thread has keeps numbers on a stack in memory, and fails here, too.

A process that interprets kernels cannot compile them, so test_compiling.py runs this in processes of its own:

    with compile_only(90) as compiled:       # for sm_90
        sparse_triton.weighted_sums(...)     # on CPU tensors; every launch compiles its kernel and runs nothing
    compiled["_sums"].asm["ptx"]
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget


@contextmanager
def compile_only(capability: int) -> Iterator[dict[str, Any]]:
    """Compile kernels where they are launched, and run none. Yields what was compiled, by the kernel's name."""
    compiled: dict[str, Any] = {}
    run = triton.JITFunction.run

    def compile_kernel(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled[kernel.__name__] = run(kernel, *args, grid=grid, warmup=True, **options)
        assert stack_bytes(compiled[kernel.__name__]) == 0, f"{kernel.__name__} spills registers"

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # the key of the cache in which a kernel keeps what is compiled
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(triton.JITFunction, "run", compile_kernel),
    ):
        yield compiled


def stack_bytes(kernel: Any) -> int:
    """Return the size of a thread's stack, on which a kernel keeps what does not fit in registers."""
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage"]
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


def launched_kernels(module: ModuleType) -> set[str]:
    """Return the names of the kernels that a module's source launches: `_name[grid](...)`."""
    return set(re.findall(r"\b(_\w+)\[", Path(str(module.__file__)).read_text()))
