"""Every operator as torch.library sees it: schema, fake tensors, mutation, tracing; and lean imports."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve_kernels import formats, ops, reference
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.cpu import encoder_attention, linears, operators, sampling
from fastserve_kernels.formats import Weight
from fastserve_kernels.kv_cache import KVCache
from fastserve_kernels.preparation import prepare

OPS = torch.ops.fastserve
MAX_IMPORT_SECONDS = 0.05
"""Beyond torch itself."""

FORMATS: dict[str, Callable[[Tensor], Weight]] = {
    "linear": formats.Dense,
    "linear_int4": lambda weight: formats.Int4.pack(weight, 32, symmetric=False),
    "linear_int8": formats.Int8.pack,
    "linear_int4_a8": lambda weight: formats.Int4.pack(weight, 32),
    "linear_int8_a8": lambda weight: formats.Int8.pack(weight, 32),
    "linear_int_rows": lambda weight: formats.IntRows.pack(weight, torch.tensor([3, 5] * 24).byte(), 32),
    "linear_nf4": lambda weight: formats.NF4.pack(weight, 32),
    "linear_fp8": formats.FP8.pack,
    "linear_w8a8": formats.W8A8.pack,
    "linear_sparse24": formats.Sparse24.pack,
    "linear_sparse24_int4": lambda weight: formats.Sparse24Int4.pack(weight, 32),
    "linear_block_sparse": lambda weight: formats.BlockSparse.pack(weight, (16, 32), 0.5),
    "linear_bitmap": lambda weight: formats.Bitmap.pack(weight, density=0.5),
    "linear_low_rank": lambda weight: formats.LowRank.pack(weight, 3),
}
OTHERS = [
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "rotary",
    "write_kv",
    "rotary_write_kv",
    "paged_attention",
    "varlen_attention",
    "sample",
    "log_probs",
]


def arguments(name: str, make_batch: Any) -> tuple[Any, ...]:
    """Arguments of the operator, on a CPU."""
    if name in FORMATS:
        weight = FORMATS[name](torch.randn(48, 64))
        prepared = prepare(weight, "cpu", torch.float32, quantize_activations=name.endswith("_a8"))
        # Plain is the dense weight, as torch's checks read addresses, which one in oneDNN's blocks has not;
        # and what a CPU multiplies by another format's operator.
        plain = name == "linear" or prepared.operator != name
        given = weight.arguments if plain else prepared.arguments
        return (torch.randn(3, 64), *given, torch.randn(48), torch.randn(3, 48))
    x = torch.randn(3, 8)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    caches = torch.zeros(4, 16, 2, 8), torch.zeros(4, 16, 2, 8)
    slots = torch.tensor([3, 40, 17])
    rows = torch.ones(3)
    if name == "paged_attention":
        batch = make_batch([1, 5], [20, 33])
        return (batch.q, batch.k_cache, batch.v_cache, *batch.layout, 0.125, None, None, None, None)
    return {
        "rms_norm": (x, torch.randn(8), 1e-5),
        "add_rms_norm": (x, torch.randn(3, 8), torch.randn(8), 1e-5),
        "swiglu": (x,),
        "rotary": (q, k, x, x),
        "write_kv": (k, k, *caches, slots, None, None),
        "rotary_write_kv": (q, k, k, x, x, *caches, slots, None, None),
        "varlen_attention": (q, q, q, torch.tensor([0, 1, 3]), 0.125, 1, torch.randn(4, 5)),
        "sample": (x, rows, torch.full((3,), 2), rows, rows * 0, rows.double() / 2),
        "log_probs": (x, torch.tensor([0, 7, 2]), 4),
    }[name]


def opcheck(name: str, given: tuple[Any, ...]) -> None:
    """torch cannot compare float8 before and after, as its schema check does."""
    float8 = any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in given)
    checks = ("test_faketensor",) if float8 else ("test_schema", "test_faketensor")
    with torch.inference_mode(False):
        given = tuple(a.clone() if isinstance(a, Tensor) and not a.is_mkldnn else a for a in given)
        torch.library.opcheck(getattr(OPS, name), given, test_utils=checks)


@pytest.mark.parametrize("name", [*FORMATS, *OTHERS])
def test_opcheck(name: str, make_batch: Any) -> None:
    opcheck(name, arguments(name, make_batch))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["write_kv", "rotary_write_kv", "paged_attention"])
def test_opcheck_of_quantized_caches(name: str, dtype: torch.dtype, make_batch: Any) -> None:
    *given, _, _ = arguments(name, make_batch)
    given = [a.to(dtype) if isinstance(a, Tensor) and a.dim() == 4 else a for a in given]
    heads = next(a.shape[2] for a in given if isinstance(a, Tensor) and a.dim() == 4)
    opcheck(name, (*given, torch.rand(heads) + 0.5, torch.rand(heads) + 0.5))


def test_every_operator_is_here() -> None:
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "fastserve::" in name}
    of_ranks = {"all_reduce_shared"}  # defined with its group: test_process_group.py
    assert defined - of_ranks == {*FORMATS, *OTHERS}


def has_implementation(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastserve::{name}", key)


@pytest.mark.parametrize("name", [*FORMATS, *OTHERS])
def test_the_implementations_have_one_signature(name: str) -> None:
    """On a CPU and on a GPU that of the reference."""
    from fastserve_kernels.gpu.registry import IMPLEMENTATIONS

    function = getattr(reference, name)
    wanted = inspect.signature(function)
    on_no_gpu = {"linear", "linear_int4_a8", "linear_int8_a8"}  # torch's own; what a CPU alone gains by
    assert has_implementation(name, "CUDA") == (name not in on_no_gpu)
    assert (function in IMPLEMENTATIONS) == (name not in on_no_gpu)
    cpu = next((m for m in (linears, operators, sampling, encoder_attention) if hasattr(m, name)), None)
    assert has_implementation(name, "CPU") == (cpu is not None)
    assert inspect.signature(getattr(cpu, name, function)) == wanted
    gpu = IMPLEMENTATIONS.get(function, function)
    assert list(inspect.signature(gpu).parameters) == list(wanted.parameters)


@pytest.mark.parametrize("name", list(FORMATS))
def test_an_operator_takes_what_its_format_gives(name: str) -> None:
    """The schema has an argument of the right type for each of the plain weight's, between x and bias."""
    (overload,) = (getattr(getattr(OPS, name), key) for key in getattr(OPS, name).overloads())
    first, *of_weight, bias, residual = overload._schema.arguments
    assert [argument.name for argument in (first, bias, residual)] == ["x", "bias", "residual"]
    for argument, value in zip(of_weight, FORMATS[name](torch.randn(48, 64)).arguments, strict=True):
        assert isinstance(value, int) == (str(argument.type) == "int")
        assert value is not None or str(argument.type) == "Optional[Tensor]"


def test_a_gpu_without_its_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert importlib.util.find_spec("triton") is None
    with pytest.raises(ImportError, match="linear_int4 on a GPU needs the package triton"):
        prepare(formats.Int4.pack(torch.randn(8, 64), 32), "cuda", torch.bfloat16)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("name", list(FORMATS))
def test_linear_traces(name: str) -> None:
    weight = prepare(FORMATS[name](torch.randn(48, 64)), "cpu", torch.float32)

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x * 2, weight, bias, x[:, :48])

    x, bias = torch.randn(5, 64), torch.randn(48)
    assert torch.equal(compiled(layer)(x, bias), layer(x, bias))


def test_a_step_of_attention_traces(make_batch: Any) -> None:
    batch = make_batch([1, 5], [20, 33])
    norm, weight = torch.randn(64), prepare(formats.Int8.pack(torch.randn(64, 9 * 64)), "cpu", torch.float32)
    cos, sin = torch.randn(6, 64), torch.randn(6, 64)
    k, v = torch.randn(2, 6, 3, 64)

    def step(q: Tensor, cache: KVCache, meta: AttentionMetadata) -> Tensor:
        q = ops.rms_norm(q, norm, 1e-5)
        q = ops.rotary_write_kv(q, k, v, cos, sin, cache, meta.slot_mapping)
        attended = ops.paged_attention(q, cache, meta, 0.125)
        y = ops.linear(attended.flatten(1), weight)
        normed, _ = ops.add_rms_norm(y, y * 2, norm, 1e-5)
        return ops.swiglu(normed)

    cache = KVCache(batch.k_cache.clone(), batch.v_cache.clone())
    wanted = step(batch.q, cache, batch.meta)
    assert not torch.equal(batch.k_cache, cache.keys)
    assert torch.equal(compiled(step)(batch.q, batch.cache(), batch.meta), wanted)
    assert torch.equal(batch.k_cache, cache.keys)
    assert torch.equal(batch.v_cache, cache.values)


def test_sampling_traces() -> None:
    rows, uniform = torch.ones(3), torch.rand(3).double()

    def last(logits: Tensor) -> tuple[Tensor, ...]:
        ids = ops.sample(logits * 2, rows, rows.int() * 5, rows * 0.9, rows * 0.1, uniform)
        return (ids, *ops.log_probs(logits, ids, 4))

    logits = torch.randn(3, 50)
    for came, wanted in zip(compiled(last)(logits), last(logits), strict=True):
        assert torch.equal(came, wanted)


def test_import_is_light_and_touches_no_device() -> None:
    """The best of a few, since the machine does other things too."""
    script = f"""
import sys, time, torch
start = time.perf_counter()
import {ops.__name__}
print(time.perf_counter() - start)
assert not torch.cuda.is_initialized()
assert not {{"fastserve", "transformers", "triton", "numba"}} & set(sys.modules)
"""
    best = 1e9
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        best = min(best, float(done.stdout))
        if best < MAX_IMPORT_SECONDS:
            break
    assert best < MAX_IMPORT_SECONDS


def test_a_device_of_no_kernels_takes_the_plain_tensors() -> None:
    weight = formats.Int4.pack(torch.randn(8, 64), 32)
    prepared = prepare(weight, "meta", torch.float32)
    assert (prepared.operator, prepared.out_features, prepared.in_features) == ("linear_int4", 8, 64)
    codes, scales, zeros, *sizes = prepared.arguments
    assert isinstance(codes, Tensor)
    assert isinstance(scales, Tensor)
    assert (codes.device.type, scales.shape, zeros, sizes) == ("meta", (8, 2), None, [8, 32])
    assert ops.linear(torch.empty(3, 64, device="meta"), prepared).shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_activations_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, not"):
        prepare(formats.Int4.pack(torch.randn(8, 64), 32), "cpu", dtype)
