"""The kernels compile to machine code, fit the GPU and spill no registers; what does not is found."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastserve_kernels.gpu.compilation import (
    Compilation,
    Usage,
    compilation,
    faults,
    parse_resource_usage,
)
from fastserve_kernels.gpu.launch import Launch
from fastserve_kernels.gpu.registry import operators

REPOSITORY = Path(__file__).parents[3]
BUILD = REPOSITORY / "build"


def command(*arguments: str, cache: Path = BUILD / "triton-cache") -> subprocess.CompletedProcess[str]:
    """Runs Python where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": str(REPOSITORY / "kernels"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("architectures", "dtypes", "report"),
    [
        (["80", "90", "100"], ["bfloat16"], "kernels"),
        (["90"], ["float16", "float32"], "kernels-other-dtypes"),
    ],
)
def test_every_kernel_compiles(architectures: list[str], dtypes: list[str], report: str, soak: bool) -> None:
    """Leaves the tables under build/. The full product of architectures, dtypes and shapes is for --soak."""
    thorough = ["--thorough"] if soak else []
    if soak:
        architectures = ["80", "90", "100"]
    done = command(
        *("-m", "fastserve_kernels", "compile", "--jobs", "2", "--arch", *architectures, "--dtype", *dtypes),
        *thorough,
        *("--out", str(BUILD / f"{report}.md"), str(BUILD / f"{report}.json")),
    )
    assert done.returncode == 0, done.stderr
    lines = (BUILD / f"{report}.md").read_text().splitlines()
    for arch in architectures:
        assert sum(f"| sm_{arch} |" in line for line in lines) >= len(operators())


FAULTY = """
import sys
import torch
import triton
import triton.language as tl
from fastserve_kernels.commands import compile
from fastserve_kernels.gpu.launch import Config, Launch
from fastserve_kernels.gpu.operator import Cost, Operator

@triton.jit
def product(x, out, N, BLOCK: tl.constexpr):
    total = tl.zeros((16, 128), tl.float32)
    for start in range(0, N, BLOCK):
        a = tl.load(x + tl.arange(0, 16)[:, None] * N + start + tl.arange(0, BLOCK)[None, :])
        b = tl.load(x + tl.arange(0, 128)[None, :] * N + start + tl.arange(0, BLOCK)[:, None])
        total = tl.dot(a, b, total)
    tl.store(out + tl.arange(0, 16)[:, None] * 128 + tl.arange(0, 128)[None, :], total)

@triton.jit
def wrong(x, out, N, BLOCK: tl.constexpr):
    tl.store(out, x + unknown)

def operator(name, kernel, block, stages):
    def plan(x, out, *, config):
        arguments = {"x": x, "out": out, "N": x.shape[1]}
        return [Launch(kernel, (1,), arguments, config.constants, config.num_warps, config.num_stages)]

    return Operator(
        name,
        lambda shape, dtype, device: (torch.randn(128, shape["k"], dtype=dtype), torch.empty(16, 128)),
        plan,
        lambda shape: [Config({"BLOCK": block}, 4, stages)],
        lambda shape, dtype: Cost(1, 1),
        ({"k": 1024}, {"k": 2048}, {"k": 1032}),
    )

OPERATORS = (
    operator("good", product, 64, 3),
    operator("large", product, 256, 6),
    operator("bad", wrong, 16, 1),
)
if __name__ == "__main__":
    rows = compile.compile_operators(OPERATORS, (80, 90), [torch.bfloat16], False, 1)
    for row in rows:
        print(row.operator, row.compilation.arch, *row.faults, sep="|")
"""


def test_faulty_kernels_are_named(tmp_path: Path) -> None:
    """Sizes that are compiled alike, 1024 and 2048, are compiled once; 1032 is no multiple of 16."""
    path = tmp_path / "faulty.py"
    path.write_text(FAULTY)
    done = command(str(path), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert [line[:2] for line in found] == [
        [name, arch] for name in ("good", "large", "bad") for _ in range(2) for arch in ("80", "90")
    ]
    complaints = {(name, arch): "; ".join(said) for name, arch, *said in reversed(found)}
    for arch in ("80", "90"):
        assert complaints["good", arch] == ""
        assert "unknown" in complaints["bad", arch]
        assert f"bytes of shared memory, sm_{arch} has" in complaints["large", arch]


ONE = Compilation("module", "kernel", 80, {}, {}, {}, {"num_warps": 8, "num_stages": 3})


def test_faults() -> None:
    assert faults(ONE, Usage(registers=128, stack=0, shared=163 * 1024), may_spill=False) == []
    assert "registers are spilled" in faults(ONE, Usage(128, 8, 0), may_spill=False)[0]
    assert faults(ONE, Usage(128, 8, 0), may_spill=True) == []
    assert "163 * 1024" not in faults(ONE, Usage(128, 0, 163 * 1024 + 1), may_spill=True)[0]
    assert faults(replace(ONE, arch=90), Usage(128, 0, 200 * 1024), may_spill=True) == []
    assert "registers" in faults(replace(ONE, options={"num_warps": 16}), Usage(255, 0, 0), may_spill=True)[0]
    assert faults(ONE, Usage(error="CompilationError: no"), may_spill=True) == ["CompilationError: no"]


def test_resource_usage() -> None:
    text = "Resource usage:\n Function mm:\n  REG:238 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:424\n"
    assert parse_resource_usage(text) == (238, 16)
    with pytest.raises(ValueError, match="no REG and STACK"):
        parse_resource_usage("Fatal : no such file")


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), reason="kernels are not interpreted"
)
def test_interpreted_kernels_are_refused() -> None:
    import triton

    @triton.jit
    def kernel(x) -> None:  # type: ignore[no-untyped-def]
        pass

    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compilation(Launch(kernel, (1,), {"x": torch.zeros(1)}, {}), 90)
