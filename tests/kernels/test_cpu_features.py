"""Kernels for other processors than this one: numba compiles for what it is told, and only that is used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numba.core.config
import pytest

from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.cpu.kernels.cpu_features import FLOAT_PRODUCTS, INTEGER_PRODUCTS

ROOT = Path(__file__).parents[2]
PROCESSORS = {
    "AVX2": ("haswell", "+avx2,+fma,+f16c"),
    "AVX2 with VNNI": ("haswell", "+avx2,+fma,+f16c,+avxvnni"),
}
"""The values of NUMBA_CPU_NAME and NUMBA_CPU_FEATURES."""
needs_avx2 = pytest.mark.skipif(
    not cpu_features.has(*INTEGER_PRODUCTS), reason="this processor lacks AVX2, FMA or F16C"
)
TESTS = (
    "tests/kernels/test_linear.py::test_activations_are_quantized_in_groups_as_the_reference_does",
    "tests/kernels/test_linear.py::test_w8a8_rounds_activations_as_the_reference_does",
    "tests/kernels/test_cpu_linear.py::test_a_row_of_quantized_activations_does_not_depend_on_the_others",
    "tests/kernels/test_cpu_linear.py::test_w8a8_sums_are_exact",
    "tests/kernels/test_small_ops.py::test_swiglu",
    "tests/kernels/test_attention.py::test_equals_the_reference",
    "tests/models/test_captured_decode.py::test_every_number_of_sequences",
)
"""Of what these processors compute by kernels of our own; the dtypes below are one of each kind."""
DTYPES = "(bfloat16 or dtype1) and not float32"
COMPILE = """
import torch
from fastserve_kernels.cpu.kernels.attention import paged_attention
from fastserve_kernels.cpu.kernels.integer_linear import linear_integers
linear_integers(torch.bfloat16, torch.bfloat16, "Nibbles")
paged_attention(torch.bfloat16, torch.bfloat16)
"""


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("", set()),
        ("+avx2,-fma,+f16c", {"avx2", "f16c"}),
        (",".join(f"+{name}" for name in FLOAT_PRODUCTS), set(FLOAT_PRODUCTS)),
    ],
)
def test_only_what_numba_is_told_is_used(told: str, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.config, "CPU_FEATURES", told)
    assert cpu_features.compiled_features.__wrapped__() == found


def test_without_a_word_it_is_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.config, "CPU_FEATURES", None)
    host = numba.core.codegen.ll.get_host_cpu_features()
    assert cpu_features.compiled_features.__wrapped__() == {name for name, there in host.items() if there}


def run(command: list[str], processor: str, **environment: str) -> str:
    name, features = PROCESSORS[processor]
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_avx2
@pytest.mark.parametrize("processor", PROCESSORS)
def test_kernels_of_integers_are_right_on(processor: str) -> None:
    came = run(["-m", "pytest", "-p", "no:cacheprovider", "-k", DTYPES, *TESTS], processor)
    assert "skipped" not in came


@needs_avx2
@pytest.mark.parametrize("processor", PROCESSORS)
def test_nothing_of_avx512_is_left_in_the_kernels_for(processor: str, tmp_path: Path) -> None:
    """Its registers and its masks would end the process with an illegal instruction."""
    assembly = run(["-c", COMPILE], processor, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_DUMP_ASSEMBLY="1")
    assert "ymm" in assembly
    assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b|\{%k", assembly)
    assert ("{vex}\tvpdpbusd" in assembly) == ("VNNI" in processor)
    assert assembly.count("vpdpbusd") == assembly.count("{vex}\tvpdpbusd")
