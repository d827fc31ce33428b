"""Every operator as torch.library sees it: schema, fake tensors, no hidden mutation."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from fastserve_kernels import ops

OPS = torch.ops.fastserve
CHECKS = ("test_schema", "test_faketensor")


def arguments(name: str, make_batch: Any) -> tuple[Any, ...]:
    x = torch.randn(3, 8)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    caches = torch.zeros(4, 16, 2, 8), torch.zeros(4, 16, 2, 8)
    slots = torch.tensor([3, 40, 17])
    rows = torch.ones(3)
    if name == "paged_attention":
        batch = make_batch([1, 5], [20, 33])
        meta = batch.meta
        where = (meta.query_start, meta.context_lens, meta.block_tables)
        return (batch.q, batch.k_cache, batch.v_cache, *where, 0.125, None, None)
    return {
        "linear": (x, torch.randn(5, 8), torch.randn(5), torch.randn(3, 5)),
        "rms_norm": (x, torch.randn(8), 1e-5),
        "add_rms_norm": (x, torch.randn(3, 8), torch.randn(8), 1e-5),
        "swiglu": (x,),
        "rotary": (q, k, x, x),
        "write_kv": (k, k, *caches, slots),
        "rotary_write_kv": (q, k, k, x, x, *caches, slots),
        "sample": (x, rows, torch.full((3,), 2), rows, rows * 0, rows.double() / 2),
        "log_probs": (x, torch.tensor([0, 7, 2]), 4),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "rms_norm",
        "add_rms_norm",
        "swiglu",
        "rotary",
        "write_kv",
        "rotary_write_kv",
        "paged_attention",
        "sample",
        "log_probs",
    ],
)
def test_opcheck(name: str, make_batch: Any) -> None:
    with torch.inference_mode(False):
        torch.library.opcheck(getattr(OPS, name), arguments(name, make_batch), test_utils=CHECKS)


def test_import_is_light_and_touches_no_device() -> None:
    script = f"""
import sys, time, torch
start = time.perf_counter()
import {ops.__name__}
print(time.perf_counter() - start)
assert not torch.cuda.is_initialized()
assert not {{"fastserve", "transformers", "triton", "numba"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
