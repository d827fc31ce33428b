"""Kernels for other processors than this one: numba compiles for what it is told, and only that is used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding
import numba.core.config
import pytest
import torch

from fastserve_kernels.cpu.kernels import cpu_features
from fastserve_kernels.cpu.kernels.attention import paged_attention
from fastserve_kernels.cpu.kernels.cpu_features import FLOAT_PRODUCTS
from fastserve_kernels.cpu.kernels.integer_linear import linear_integers

ROOT = Path(__file__).parents[2]
BYTES = (
    "tests/kernels/test_linear.py::test_activations_are_quantized_in_groups_as_the_reference_does",
    "tests/kernels/test_cpu_features.py::test_without_avx512_nothing_of_it_is_left",
)
OTHERS = (
    "tests/kernels/test_linear.py::test_w8a8_rounds_activations_as_the_reference_does",
    "tests/kernels/test_attention.py::test_equals_the_reference",
    "tests/models/test_captured_step.py::test_every_number_of_tokens",
)
PROCESSORS = {"+avx2,+fma,+f16c": (*BYTES, *OTHERS), "+avx2,+fma,+f16c,+avxvnni": BYTES}
"""By the value of NUMBA_CPU_FEATURES: tests of what these compute by kernels of our own. VNNI multiplies
bytes alone."""
IN_BFLOAT16 = "dtype2 or bfloat16 or without_avx512"


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
    host = llvmlite.binding.get_host_cpu_features()
    assert cpu_features.compiled_features.__wrapped__() == {name for name, there in host.items() if there}


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """By features, pytest with kernels for them. They run side by side: compiling takes one core."""
    started = {}
    for features, tests in PROCESSORS.items():
        environment = {
            **os.environ,
            "NUMBA_CPU_NAME": "haswell",
            "NUMBA_CPU_FEATURES": features,
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
        }
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", IN_BFLOAT16, *tests]
        if cpu_features.has(*features.replace("+", "").split(",")):
            started[features] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("features", PROCESSORS)
def test_kernels_for(features: str, runs: dict[str, subprocess.Popen[str]]) -> None:
    if features not in runs:
        pytest.skip("this processor cannot run them")
    output, _ = runs[features].communicate()
    assert runs[features].returncode == 0, output
    assert "skipped" not in output


@pytest.mark.skipif(cpu_features.has("avx512bw"), reason="they may use AVX-512")
def test_without_avx512_nothing_of_it_is_left() -> None:
    """Its registers and masks would end the process with an illegal instruction."""
    for kernel in (linear_integers(torch.bfloat16, None, "Nibbles"), paged_attention(torch.bfloat16, None)):
        library = kernel._compiled._library
        assembly = library.codegen._tm.emit_assembly(library._get_module_for_linking())
        assert "%ymm" in assembly
        assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b", assembly)
        assert len(re.findall(r"\tvpdpbusd", assembly)) == len(re.findall(r"\{vex\}\tvpdpbusd", assembly))
