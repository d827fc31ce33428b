"""What others offer on a GPU for the same work, as far as it is installed.

A maker takes a shape and how many copies of the weight (or cache) are wanted, and returns a call on each.
What it raises where a library is missing, or refuses the shape, stands in the report. The weights are random:
the peers' accuracy is not measured here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastserve_kernels.bench.calls import Call, on_each
from fastserve_kernels.gpu.operator import Shape

Maker = Callable[[Shape, int], list[Call]]

DTYPE = torch.bfloat16
BASELINE = "cuBLAS bf16"
VLLM_UINT4B8 = 4 << 8 | 8 << 17 | 1 << 50
"""vLLM's ScalarType.id of four bits with a bias of 8: its bits, its bias, and that NaN is as in IEEE 754."""


def load_vllm(library: Path) -> None:
    """Registers the operators of vllm/_C.abi3.so out of a vLLM wheel; the rest of vLLM is not needed.

    Raises ValueError if there is no such file.
    """
    if not library.is_file():
        raise ValueError(f"--vllm-library: there is no file {library}")
    torch.ops.load_library(str(library))


def _activations(shape: Shape, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape["m"], shape["k"], dtype=dtype, device="cuda")


def _weights(shape: Shape, count: int, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    size = (shape["n"], shape["k"])
    return [torch.randn(size, dtype=dtype, device="cuda") * shape["k"] ** -0.5 for _ in range(count)]


def cublas(shape: Shape, count: int) -> list[Call]:
    """torch's own product with a bfloat16 weight, one call for each of `count` copies of it."""
    x = _activations(shape)
    return on_each(lambda w: torch.nn.functional.linear(x, w), _weights(shape, count))


def tinygemm(shape: Shape, count: int) -> list[Call]:
    """torch's `_weight_int4pack_mm`."""
    n, k, group = shape["n"], shape["k"], shape["group_size"]
    x = _activations(shape)
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, 8)
    pairs = torch.rand(k // group, n, 2, dtype=DTYPE, device="cuda")
    copies = [packed.clone() for _ in range(count)]
    return on_each(lambda w: torch._weight_int4pack_mm(x, w, group, pairs), copies)


def gemlite(shape: Shape, count: int) -> list[Call]:
    """gemlite's 4-bit product with float16 activations, one call for each copy of the weight."""
    helper = importlib.import_module("gemlite.helper")
    n, k, group = shape["n"], shape["k"], shape["group_size"]
    x = _activations(shape, torch.float16)

    def layer() -> Call:
        codes = torch.randint(16, (n, k), dtype=torch.uint8, device="cuda")
        scales, zeros = (torch.rand(n * k // group, 1, dtype=x.dtype, device="cuda") for _ in range(2))
        packed = helper.A16W4_HQQ_INT(device="cuda:0", dtype=x.dtype).from_weights(codes, scales, zeros)
        return lambda: packed(x)

    return [layer() for _ in range(count)]


def _vllm_operator(*names: str) -> Callable[..., Tensor]:
    """The first of these operators that the loaded library has; its releases have renamed them."""
    for name in names:
        if hasattr(torch.ops._C, name):
            return getattr(torch.ops._C, name)
    raise ImportError(f"none of vLLM's operators {', '.join(names)} is loaded: give --vllm-library")


def marlin(shape: Shape, count: int) -> list[Call]:
    """vLLM's Marlin kernel for 4-bit weights, one call for each copy of the weight."""
    multiply = _vllm_operator("marlin_gemm", "gptq_marlin_gemm")
    m, n, k, group = (shape[name] for name in ("m", "n", "k", "group_size"))
    x = _activations(shape)
    integers = torch.iinfo(torch.int32)
    codes = torch.randint(integers.min, integers.max, (k // 16, n * 2), dtype=torch.int32, device="cuda")
    scales = torch.rand(k // group, n, dtype=DTYPE, device="cuda")
    workspace = torch.zeros(
        torch.cuda.get_device_properties(x.device).multi_processor_count, dtype=torch.int32, device="cuda"
    )
    fields = {argument.name for argument in multiply.default._schema.arguments}  # type: ignore[attr-defined]
    absent = {"c_or_none": None, "b_bias_or_none": None, "a_scales": None, "global_scale": None}
    absent |= {
        "global_scale_or_none": None,
        "b_zeros_or_none": None,
        "g_idx_or_none": None,
        "perm_or_none": None,
    }
    keywords = {
        "a": x,
        "b_scales": scales,
        "workspace": workspace,
        "b_type_id": VLLM_UINT4B8,
        "b_q_type_id": VLLM_UINT4B8,
        "size_m": m,
        "size_n": n,
        "size_k": k,
        "is_k_full": True,
        "use_atomic_add": False,
        "use_fp32_reduce": True,
        "is_zp_float": False,
        **absent,
    }
    taken = {name: value for name, value in keywords.items() if name in fields}
    copies = [codes.clone() for _ in range(count)]
    return on_each(lambda w: multiply(b_q_weight=w, **taken), copies)


def machete(shape: Shape, count: int) -> list[Call]:
    """vLLM's Machete kernel for 4-bit weights (Hopper), one call for each copy of the weight."""
    pack = _vllm_operator("machete_prepack_B")
    multiply = _vllm_operator("machete_mm")
    n, k, group = shape["n"], shape["k"], shape["group_size"]
    x = _activations(shape)
    integers = torch.iinfo(torch.int32)
    codes = torch.randint(integers.min, integers.max, (n, k // 8), dtype=torch.int32, device="cuda").t()
    packed = pack(codes, DTYPE, VLLM_UINT4B8, DTYPE)
    scales = torch.rand(k // group, n, dtype=DTYPE, device="cuda")
    copies = [packed.clone() for _ in range(count)]
    rest = (VLLM_UINT4B8, DTYPE, scales, None, group, None, None, None)
    return on_each(lambda w: multiply(x, w, *rest), copies)


def bitsandbytes_nf4(shape: Shape, count: int) -> list[Call]:
    """bitsandbytes' NF4 product in blocks of 64, one call for each weight."""
    library = importlib.import_module("bitsandbytes")
    x = _activations(shape)

    def layer(weight: Tensor) -> Call:
        codes, state = library.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return lambda: library.matmul_4bit(x, codes.t(), quant_state=state)

    return [layer(weight) for weight in _weights(shape, count)]


def cusparselt(shape: Shape, count: int) -> list[Call]:
    """torch's 2:4 semi-structured product, one call for each weight."""
    x = _activations(shape)
    keep = torch.tensor([True, False, True, False], device="cuda").repeat(shape["n"], shape["k"] // 4)
    sparse = [torch.sparse.to_sparse_semi_structured(w * keep) for w in _weights(shape, count)]
    return on_each(lambda w: torch.nn.functional.linear(x, w), sparse)


def torch_int8(shape: Shape, count: int) -> list[Call]:
    """torch's `_weight_int8pack_mm`: one scale per row."""
    x = _activations(shape)
    scales = torch.rand(shape["n"], dtype=DTYPE, device="cuda")
    return on_each(lambda w: torch._weight_int8pack_mm(x, w, scales), _int8_weights(shape, count))


def torch_int_mm(shape: Shape, count: int) -> list[Call]:
    """torch's `_int_mm`: the bare product of integers, neither quantizing nor scaling."""
    x = torch.randint(-128, 128, (shape["m"], shape["k"]), dtype=torch.int8, device="cuda")
    return on_each(lambda w: torch._int_mm(x, w.t()), _int8_weights(shape, count))


def _int8_weights(shape: Shape, count: int) -> list[Tensor]:
    size = (shape["n"], shape["k"])
    return [torch.randint(-128, 128, size, dtype=torch.int8, device="cuda") for _ in range(count)]


def _cache(shape: Shape) -> Tensor:
    """Keys or values of all sequences, block by block."""
    blocks = shape["batch"] * shape["context"] // shape["block_size"]
    size = (blocks, shape["block_size"], shape["kv_heads"], shape["dim"])
    return torch.randn(size, dtype=DTYPE, device="cuda")


def _queries(shape: Shape) -> Tensor:
    return torch.randn(shape["tokens"], shape["heads"], shape["dim"], dtype=DTYPE, device="cuda")


def _tables(shape: Shape) -> Tensor:
    blocks = shape["batch"] * shape["context"] // shape["block_size"]
    return torch.randperm(blocks, dtype=torch.int32, device="cuda").view(shape["batch"], -1)


def sdpa(shape: Shape, count: int) -> list[Call]:
    """scaled_dot_product_attention on keys and values that lie in one piece, as no paged cache has them."""
    batch, queries = shape["batch"], shape["tokens"] // shape["batch"]
    q = _queries(shape).view(batch, queries, shape["heads"], shape["dim"]).transpose(1, 2)
    size = (batch, shape["kv_heads"], shape["context"], shape["dim"])
    mask = None
    if queries > 1:
        ones = torch.ones(queries, shape["context"], dtype=torch.bool, device="cuda")
        mask = ones.tril(shape["context"] - queries)
    caches = [tuple(torch.randn(size, dtype=DTYPE, device="cuda") for _ in range(2)) for _ in range(count)]

    def attend(k: Tensor, v: Tensor) -> Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return on_each(lambda kv: attend(*kv), caches)


def flash_attention(shape: Shape, count: int) -> list[Call]:
    """FlashAttention over a paged cache, one call for each copy of the cache."""
    attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
    batch, queries = shape["batch"], shape["tokens"] // shape["batch"]
    q = _queries(shape).view(batch, queries, shape["heads"], shape["dim"])
    tables = _tables(shape)
    lengths = torch.full((batch,), shape["context"], dtype=torch.int32, device="cuda")
    caches = [(_cache(shape), _cache(shape)) for _ in range(count)]
    keywords = {"cache_seqlens": lengths, "block_table": tables, "causal": True}
    return on_each(lambda kv: attend(q, *kv, **keywords), caches)


def flashinfer(shape: Shape, count: int) -> list[Call]:
    """Decode; planned beforehand, as a step does once for all layers."""
    library = importlib.import_module("flashinfer")
    if shape["tokens"] != shape["batch"]:
        raise NotImplementedError("measured for decode only")
    q = _queries(shape)
    batch, width = shape["batch"], shape["context"] // shape["block_size"]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * width
    pages = _tables(shape).flatten()
    last = torch.full((batch,), shape["block_size"], dtype=torch.int32, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=pages.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    sizes = (shape["heads"], shape["kv_heads"], shape["dim"], shape["block_size"])
    wrapper.plan(starts, pages, last, *sizes, q_data_type=DTYPE, kv_data_type=DTYPE)
    caches = [(_cache(shape), _cache(shape)) for _ in range(count)]
    return on_each(lambda kv: wrapper.run(q, kv), caches)


LINEAR: Mapping[str, Mapping[str, Maker]] = {
    "linear_int4": {"tinygemm": tinygemm, "gemlite": gemlite, "marlin": marlin, "machete": machete},
    "linear_nf4": {"bitsandbytes": bitsandbytes_nf4},
    "linear_int8": {"torch int8": torch_int8},
    "linear_w8a8": {"torch _int_mm": torch_int_mm},
    "linear_sparse24": {"cuSPARSELt": cusparselt},
}
ATTENTION: Mapping[str, Maker] = {"SDPA": sdpa, "FlashAttention": flash_attention, "FlashInfer": flashinfer}


def peers_of(operator: str) -> Mapping[str, Maker]:
    """The contestants of an operator, dense ones first."""
    if operator.startswith("linear"):
        return {BASELINE: cublas, **LINEAR.get(operator, {})}
    if operator.startswith("paged_attention"):
        return ATTENTION
    return {}
