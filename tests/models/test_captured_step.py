"""A captured step computes what the decoder computes, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from fastserve.checkpoints.kv_cache_scheme import KVScales
from fastserve.models.captured_step import CapturedStep, capture_step
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import make_kv_caches
from fastserve.models.model_loader import load_model
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.cpu.kernels.cpu_features import FLOAT_PRODUCTS, INTEGER_PRODUCTS, has

NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_TOKENS, MAX_BLOCKS = 64, 4, 9, 12
WINDOW = {"mistral": {"sliding_window": 6}}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, _one_thread: None) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def caches_of(model: Decoder, dtype: torch.dtype) -> list:
    scale = torch.full((model.config.num_kv_heads,), 0.05)
    scales = [KVScales(scale, scale)] * model.config.num_layers if dtype == torch.int8 else None
    caches = make_kv_caches(model.kv_cache_shapes(NUM_BLOCKS, BLOCK_SIZE), dtype, "cpu", scales)
    generator = torch.Generator().manual_seed(0)
    for cache in caches:
        for part in (cache.keys, cache.values):
            part.copy_(torch.randn(part.shape, generator=generator) * (20 if dtype == torch.int8 else 1))
    return caches


@pytest.mark.parametrize(
    ("model_type", "quantization", "activations", "dtype", "kv_dtype"),
    [
        ("llama", "int4", "none", "bfloat16", torch.bfloat16),
        ("qwen2", "int8", "int8", "bfloat16", torch.int8),
        ("qwen3", "w8a8", "none", "bfloat16", torch.bfloat16),
        ("llama", "nf4", "none", "float16", torch.float16),
        ("mistral", "fp8", "none", "float32", torch.float32),
        ("mistral", "int4", "int8", "bfloat16", torch.bfloat16),
    ],
)
def test_every_number_of_tokens(
    model_type: str,
    quantization: str,
    activations: str,
    dtype: str,
    kv_dtype: torch.dtype,
    threads: None,
    save_model: Callable,
) -> None:
    if activations == "int8" and not has(*INTEGER_PRODUCTS):
        pytest.skip("this processor lacks AVX2, FMA or F16C")
    directory, _ = save_model(model_type, hidden_size=64, intermediate_size=96, **WINDOW.get(model_type, {}))
    model = load_model(str(directory), dtype, quantization=quantization, activation_quantization=activations)
    assert isinstance(model, Decoder)
    ours, theirs = caches_of(model, kv_dtype), caches_of(model, kv_dtype)
    warm_up(model, ours)
    warm_up(model, theirs)
    captured = capture_step(model, ours, MAX_NUM_TOKENS, MAX_BLOCKS, BLOCK_SIZE)
    is_integers = activations == "int8" or quantization == "w8a8"
    if not has(*(INTEGER_PRODUCTS if is_integers else FLOAT_PRODUCTS)):
        assert captured is None  # the weights have become dense
        return
    assert isinstance(captured, CapturedStep)
    numbers = random.Random(0)
    for count in [*range(1, MAX_NUM_TOKENS + 1), 5, 1, 9]:  # twice too, of other blocks
        for query_lens in ([1] * count, a_composition(count, numbers), [count]):
            meta = a_batch(query_lens, numbers)
            token_ids = torch.tensor([numbers.randrange(model.vocab_size) for _ in range(count)])
            hidden = captured.forward(token_ids, meta)
            assert torch.equal(hidden, model.forward(token_ids, meta, theirs))
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.keys, other.keys)
                assert torch.equal(one.values, other.values)


def a_composition(total: int, numbers: random.Random) -> list[int]:
    """Numbers of at least 1 whose sum it is."""
    ends = [*sorted(numbers.sample(range(1, total), numbers.randrange(total))), total]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def a_batch(query_lens: list[int], numbers: random.Random) -> AttentionMetadata:
    """Sequences of any lengths, each in blocks of its own."""
    most = min(MAX_BLOCKS, NUM_BLOCKS // len(query_lens)) * BLOCK_SIZE
    context_lens = [numbers.randint(queries, most) for queries in query_lens]
    blocks = numbers.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[blocks.pop() for _ in range(-(-length // BLOCK_SIZE))] for length in context_lens]
    return AttentionMetadata.build(query_lens, context_lens, tables, BLOCK_SIZE, "cpu")


def warm_up(model: Decoder, caches: list) -> None:
    meta = AttentionMetadata.build([1], [1], [[0]], BLOCK_SIZE, "cpu")
    model.forward(torch.zeros(1, dtype=torch.int64), meta, caches)


def test_a_dense_model_is_not_captured(save_model: Callable) -> None:
    """Its products are oneDNN's."""
    directory, _ = save_model("llama")
    model = load_model(str(directory), "bfloat16")
    assert isinstance(model, Decoder)
    caches = caches_of(model, torch.bfloat16)
    warm_up(model, caches)
    assert capture_step(model, caches, MAX_NUM_TOKENS, MAX_BLOCKS, BLOCK_SIZE) is None
