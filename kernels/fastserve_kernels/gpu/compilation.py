"""Compiling kernels to machine code on any machine, GPU or not, and what of a GPU's resources they take."""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastserve_kernels.gpu.launch import Launch

SHARED_KILOBYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""Shared memory that a block may have, by compute capability (80: 8.0): CUDA C++ Programming Guide, table of
technical specifications."""
REGISTER_LIMIT = 64 * 1024
"""Registers of 32 bits that a block may have."""


@dataclass(frozen=True)
class Compilation:
    """A kernel with everything that decides its machine code. It can be sent to another process."""

    module: str
    kernel: str
    arch: int
    signature: Mapping[str, str]
    """Type of each parameter, "constexpr" included."""
    constants: Mapping[tuple[int, ...], Any]
    """By the parameter's place. Arguments that are 1 or None are among them, as when launched."""
    attributes: Mapping[tuple[int, ...], list[list[Any]]]
    """Which arguments are multiples of 16."""
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Equal for those that are compiled alike."""
        return repr(
            (self.module, self.kernel, self.arch, self.signature, self.constants, self.attributes)
        ) + (f"{self.num_warps} {self.num_stages}")

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return int(self.options["num_warps"])

    @property
    def num_stages(self) -> int:
        """Stages of the software pipeline."""
        return int(self.options["num_stages"])

    @property
    def label(self) -> str:
        """Its compile-time sizes and options for people."""
        names = list(self.signature)
        given = [f"{names[path[0]]}={value}" for path, value in self.constants.items()]
        return " ".join([*given, f"warps={self.num_warps}", f"stages={self.num_stages}"])


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes. An error and no more if it could not be compiled."""

    registers: int = 0
    """Registers of each thread."""
    stack: int = 0
    """Bytes of each thread in local memory: spilled registers lie there, so that 0 says that none is."""
    shared: int = 0
    """Bytes of each block."""
    error: str = ""


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that a block may have; of the least that is known, if the GPU is not."""
    return 1024 * SHARED_KILOBYTES.get(arch, min(SHARED_KILOBYTES.values()))


def compilation(launch: Launch, arch: int) -> Compilation:
    """What Triton's own launcher would compile for these arguments on a GPU of that capability.

    Raises RuntimeError if kernels are interpreted in this process: then there is nothing to compile.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(f"{kernel.__name__} is interpreted in this process: unset TRITON_INTERPRET")
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {
        **launch.arguments,
        **launch.constants,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "debug": False,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    bound, specialisation, options = bind(**keywords)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialisation, options
    )
    return Compilation(
        kernel.__module__, kernel.__name__, arch, signature, constants, attributes, dict(parsed.__dict__)
    )


def compile_kernel(compilation: Compilation) -> Usage:
    """Compiles through Triton's disk cache: a launch with the same arguments then finds it there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(compilation.module), compilation.kernel)
    source = ASTSource(kernel, compilation.signature, compilation.constants, compilation.attributes)
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", compilation.arch, 32), options=dict(compilation.options)
        )
    except Exception as error:  # whatever a kernel's source makes the compiler raise belongs in the report
        return Usage(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    registers, stack = parse_resource_usage(_resource_usage(compiled.asm["cubin"]))
    return Usage(registers, stack, compiled.metadata.shared)


def _resource_usage(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_resource_usage(text: str) -> tuple[int, int]:
    """(registers, bytes of stack) from the output of `cuobjdump -res-usage` for one kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage: no REG and STACK in {text!r}")
    return int(found[1]), int(found[2])


class Compiler:
    """Compiles in several processes, and what is compiled alike only once."""

    def __init__(self, jobs: int) -> None:
        self._pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
        self._usages: dict[str, Usage] = {}

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def usages(self, compilations: Sequence[Compilation]) -> list[Usage]:
        """What each takes, in order."""
        new = {one.key: one for one in compilations if one.key not in self._usages}
        self._usages.update(zip(new, self._pool.map(compile_kernel, new.values()), strict=True))
        return [self._usages[one.key] for one in compilations]


def faults(compilation: Compilation, usage: Usage, *, may_spill: bool) -> list[str]:
    """Why a kernel must not be used as it is: it does not compile, does not fit, or spills registers."""
    if usage.error:
        return [usage.error]
    found = []
    if usage.stack and not may_spill:
        found.append(f"{usage.stack} bytes of stack per thread: registers are spilled")
    if usage.shared > (limit := shared_limit(compilation.arch)):
        found.append(f"{usage.shared} bytes of shared memory, sm_{compilation.arch} has {limit}")
    if usage.registers * 32 * compilation.num_warps > REGISTER_LIMIT:
        found.append(f"{usage.registers} registers in each of {compilation.num_warps} warps do not fit")
    return found
