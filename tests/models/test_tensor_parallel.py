"""Decoders that several ranks compute, here threads of one process, are those that one computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rank_threads import gloo, on_each, shared_memory
from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.weight_shards import shard_columns, shard_rows
from fastserve.models.decoder import Decoder
from fastserve.models.linear import parts_of
from fastserve.models.model_loader import load_model
from fastserve_kernels import formats
from fastserve_kernels.formats import Weight
from fastserve_kernels.process_group import ProcessGroup

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def logits_of_ranks(groups: list[ProcessGroup], path: Path, run: Callable, *arguments: Any) -> list[Tensor]:
    """Rank 0's logits of several sequences."""

    def compute(group: ProcessGroup) -> list[Tensor]:
        torch.set_num_threads(1)
        model = load_model(str(path), "float32", group=group, quantization=arguments[0])
        return run(model, *arguments[1:])

    return on_each(groups, compute)[0]


@pytest.mark.parametrize("make_groups", [shared_memory, gloo])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_computes(
    make_groups: Any, ranks: int, save_model: Any, sequences: Any, logits_over_paged_cache: Any
) -> None:
    """With four ranks, two have the same KV head. Qwen2 has biases, and 199 tokens divide by none."""
    directory, _ = save_model("qwen2", tie_word_embeddings=ranks == 2, **SIZES)
    expected = logits_over_paged_cache(load_model(str(directory), "float32"), sequences)
    found = logits_of_ranks(make_groups(ranks), directory, logits_over_paged_cache, "auto", sequences)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("quantization", ["none", "int4", "int8", "nf4", "fp8"])
def test_weights_are_rounded_as_those_of_one(
    quantization: str, save_model: Any, sequences: Any, logits_over_paged_cache: Any
) -> None:
    directory, _ = save_model("llama", **SIZES, attention_bias=True, mlp_bias=True)
    whole = load_model(str(directory), "float32", quantization=quantization)
    expected = logits_over_paged_cache(whole, sequences)
    found = logits_of_ranks(shared_memory(2), directory, logits_over_paged_cache, quantization, sequences)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=2e-4, rtol=2e-4)


def test_gguf_blocks_are_cut(
    write_gguf: Any, save_model: Any, sequences: Any, logits_over_paged_cache: Any
) -> None:
    """Also the rows of queries and keys, which llama.cpp orders in another way."""
    _, model = save_model("llama", **SIZES)
    path = write_gguf(model, "llama", GGMLQuantizationType.Q4_1)
    expected = logits_over_paged_cache(load_model(str(path), "float32"), sequences)
    found = logits_of_ranks(shared_memory(2), path, logits_over_paged_cache, "auto", sequences)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=2e-4, rtol=2e-4)


def test_a_rank_has_its_share(save_model: Any) -> None:
    directory, _ = save_model("llama", **SIZES, tie_word_embeddings=True)

    def num_bytes(group: ProcessGroup | None) -> int:
        model = load_model(str(directory), "float32", group=group, quantization="int8")
        assert isinstance(model, Decoder)
        assert model.weights.lm_head is not None
        layers = list(model.weights.layers)
        linears = [each for layer in layers for each in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj)]
        linears += [model.weights.lm_head, *(layer.down_proj for layer in layers)]
        return sum(part.weight.nbytes for each in linears for part in parts_of(each))

    shares = on_each(shared_memory(4), num_bytes)
    assert sum(shares) <= 1.15 * num_bytes(None)
    assert max(shares) <= 1.15 * num_bytes(None) / 4


@pytest.mark.parametrize("ranks", [3, 8])
def test_head_counts_that_do_not_divide_are_refused(ranks: int, save_model: Any) -> None:
    directory, _ = save_model("llama", **SIZES)
    with pytest.raises(ModelError, match=rf"got {ranks}; allowed for 4 heads and 2 KV heads: 1, 2, 4$"):
        on_each(shared_memory(ranks), lambda group: load_model(str(directory), group=group))


def test_what_transformers_runs_is_refused(save_model: Any) -> None:
    directory, _ = save_model("gpt2", n_embd=48, n_head=4, n_layer=1, n_positions=64)
    with pytest.raises(ModelError, match=r"tensor_parallel_size: got 2; allowed for .*: 1, because"):
        on_each(shared_memory(2), lambda group: load_model(str(directory), group=group))


ROWS, COLUMNS = 64, 256


def low_rank(weight: Tensor) -> Weight:
    return formats.LowRank.pack(weight, 8)


def int_rows(weight: Tensor) -> Weight:
    bits = torch.randint(2, 9, (ROWS,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return formats.IntRows.pack(weight, bits, 128, symmetric=False)


PACKS: dict[str, Callable[[Tensor], Weight]] = {
    "Dense": formats.Dense,
    "Int4": lambda weight: formats.Int4.pack(weight, 128, symmetric=False),
    "Int4 by row": lambda weight: formats.Int4.pack(weight, None),
    "Int8": lambda weight: formats.Int8.pack(weight, 64),
    "IntRows": int_rows,
    "NF4": lambda weight: formats.NF4.pack(weight, 64),
    "FP8": lambda weight: formats.FP8.pack(weight, None),
    "W8A8": formats.W8A8.pack,
    "Sparse24": formats.Sparse24.pack,
    "Sparse24Int4": lambda weight: formats.Sparse24Int4.pack(weight, 64),
    "BlockSparse": lambda weight: formats.BlockSparse.pack(weight, (32, 64), 0.5),
    "Bitmap": lambda weight: formats.Bitmap.pack(weight, density=0.5),
    "LowRank": low_rank,
}


@pytest.mark.parametrize("name", PACKS)
@settings(deadline=None, max_examples=8)
@given(cuts=st.tuples(st.integers(0, 1), st.integers(1, 3)))
def test_parts_of_a_weight_are_its_numbers(name: str, cuts: tuple[int, int]) -> None:
    """Columns are cut at multiples of 32, in the midst of groups too."""
    weight = PACKS[name](torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)))
    rows = range(32 * cuts[0], 32 * (cuts[0] + 1))
    columns = range(32 * cuts[1], 32 * (cuts[1] + 3))
    whole = weight.dequantize()
    assert torch.equal(shard_rows(weight, rows).dequantize(), whole[rows.start : rows.stop])
    assert torch.equal(shard_columns(weight, columns).dequantize(), whole[:, columns.start : columns.stop])


def test_groups_that_cannot_be_cut_are_refused() -> None:
    weight = formats.Int4.pack(torch.randn(4, 256), 64)
    with pytest.raises(ModelError, match=r"Int4 cannot be cut at columns 0 and 40 of 256 .* multiples of 32"):
        shard_columns(weight, range(40))
