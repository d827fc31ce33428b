"""Conversion from and to the layouts of the `compressed-tensors` library, against it and against literals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastserve_kernels.formats import FP8, NF4, W8A8, Bitmap, Int4, Int8, Sparse24, Weight
from fastserve_kernels.formats.bitpacking import pack_codes, unpack_codes
from fastserve_kernels.formats.compressed_tensors import (
    CompressedTensors,
    bits_of,
    from_compressed_tensors,
    to_compressed_tensors,
)
from fastserve_kernels.formats.quantized import round_to_integers
from fastserve_kernels.formats.weight import pack_pairs


def rounded(bits: int, symmetric: bool) -> Callable[[Tensor], Weight]:
    """Makes a weight of so many bits in groups of 32, its codes in the middle of the format's range."""

    def make(weight: Tensor) -> Weight:
        codes, scales, zeros = round_to_integers(weight, 32, bits, symmetric, None)
        middle = 2 ** (bits - 1)
        signed, zeros = codes - middle, None if zeros is None else zeros - middle
        if bits > 4:
            return Int8(signed.to(torch.int8), scales, zeros, 32)
        return Int4(pack_pairs(signed + 8), scales, None if zeros is None else zeros + 8, 32)

    return make


MAKERS: dict[str, Callable[[Tensor], Weight]] = {
    "int4": lambda w: Int4.pack(w, 32),
    "int4 with zeros": lambda w: Int4.pack(w, 32, symmetric=False),
    "int4 per row": lambda w: Int4.pack(w, None, symmetric=False),
    "int8": lambda w: Int8.pack(w),
    "int8 with zeros": lambda w: Int8.pack(w, 64, symmetric=False),
    "fp8": lambda w: FP8.pack(w),
    "fp8 in groups": lambda w: FP8.pack(w, 64),
    "w8a8": lambda w: W8A8.pack(w),
    "sparse24": lambda w: Sparse24.pack(w),
    "bitmap": lambda w: Bitmap.pack(w, density=0.5),
    **{f"{bits} bits": rounded(bits, True) for bits in (2, 3, 5, 6, 7)},
    **{f"{bits} bits with zeros": rounded(bits, False) for bits in (2, 3, 5, 6, 7)},
}


def equal(came: Tensor, wanted: Tensor) -> bool:
    """To the bit."""
    alike = came.dtype == wanted.dtype and came.shape == wanted.shape
    return alike and torch.equal(came.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8))


def same(came: Weight, wanted: Weight) -> bool:
    """All tensors to the bit, and all else."""
    return type(came) is type(wanted) and all(
        equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(vars(came).values(), vars(wanted).values(), strict=True)
    )


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(MAKERS)),
    st.integers(1, 19),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_there_and_back_is_the_same(maker: str, rows: int, groups: int, dtype: torch.dtype) -> None:
    weight = MAKERS[maker](torch.randn(rows, 64 * groups).to(dtype))
    assert same(from_compressed_tensors(to_compressed_tensors(weight)), weight)


@pytest.mark.parametrize("columns", [2, 6, 10, 34])
def test_rows_of_codes_that_do_not_fill_words(columns: int) -> None:
    weight = Int4.pack(torch.randn(3, columns), None)
    compressed = to_compressed_tensors(weight)
    assert compressed.tensors["weight_packed"].shape == (3, -(-columns // 8))
    assert same(from_compressed_tensors(compressed), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maker", [name for name in MAKERS if name not in ("sparse24", "bitmap")])
def test_the_library_reads_what_is_written_and_writes_what_is_read(maker: str, dtype: torch.dtype) -> None:
    library = pytest.importorskip("compressed_tensors", reason="it needs Python 3.11")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    weight = MAKERS[maker](torch.randn(24, 192).to(dtype))
    compressed = to_compressed_tensors(weight)
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], **compressed.scheme)
    assert compressors.format.infer_module_format(torch.nn.Linear, scheme).value == compressed.format
    compressor = compressors.BaseCompressor.get_value_from_registry(compressed.format)

    read = compressor.decompress(dict(compressed.tensors), scheme)
    # It multiplies in the scales' dtype, so rounds once more.
    assert torch.equal(read["weight"], weight.dequantize().to(dtype if maker != "w8a8" else torch.float32))

    if dtype != torch.float32:  # what was rounded to less than the codes hold does not come back
        return
    written = compressor.compress(dict(read), scheme)
    assert written.keys() == compressed.tensors.keys()
    for name, wanted in compressed.tensors.items():
        assert equal(written[name], wanted), name
    assert same(from_compressed_tensors(replace(compressed, tensors=written)), weight)


def test_literal_packed_codes() -> None:
    """Two rows of nine codes, of four bits: a word and a half-empty one each, the first code lowest."""
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [15, 14, 13, 12, 11, 10, 9, 8, 7, 6]])
    compressed = CompressedTensors(
        "pack-quantized",
        {
            "weight_packed": torch.tensor([[0x76543210, 0x98], [0x89ABCDEF - 2**32, 0x67]]).int(),
            "weight_scale": torch.tensor([[0.5], [2.0]]),
            "weight_zero_point": torch.tensor([[0x53]]).int(),
            "weight_shape": torch.tensor([2, 10]),
        },
        {"weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}},
    )
    wanted = (codes - torch.tensor([[3], [5]])) * torch.tensor([[0.5], [2.0]])
    assert torch.equal(from_compressed_tensors(compressed).dequantize(), wanted)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_codes_follow_each_other_bit_by_bit(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    words = pack_codes(codes, bits)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(code << bits * place for place, code in enumerate(row))
        assert stream == sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(packed))
    assert torch.equal(unpack_codes(words, bits, columns), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_number_of_bits_survives(bits: int, symmetric: bool) -> None:
    weight = rounded(bits, symmetric)(torch.randn(8, 64))
    assert isinstance(weight, Int4 | Int8)
    assert bits_of(weight) == bits
    compressed = to_compressed_tensors(weight)
    assert compressed.scheme["weights"]["num_bits"] == bits
    assert compressed.tensors["weight_packed"].shape == (8, 64 * bits // 32)


def test_zeros_count_among_the_bits() -> None:
    """All weights of a row positive: the codes are high, the zero is low."""
    weight = Int4(pack_pairs(torch.full((1, 32), 9)), torch.ones(1, 1), torch.tensor([[1.0]]), 32)
    assert bits_of(weight) == 4
    assert same(from_compressed_tensors(to_compressed_tensors(weight)), weight)


@pytest.mark.parametrize(("bits", "per_word"), [(3, 10), (5, 6), (6, 5), (7, 4)])
def test_words_of_old_versions_that_begin_with_a_new_code(bits: int, per_word: int) -> None:
    weight = rounded(bits, True)(torch.randn(3, 96))
    compressed = to_compressed_tensors(weight)
    codes = unpack_codes(compressed.tensors["weight_packed"], bits, 96).tolist()
    words = [
        [
            sum(code << bits * place for place, code in enumerate(row[start : start + per_word]))
            for start in range(0, 96, per_word)
        ]
        for row in codes
    ]
    tensors = {**compressed.tensors, "weight_packed": torch.tensor(words).int()}
    assert same(from_compressed_tensors(replace(compressed, tensors=tensors)), weight)


def test_literal_sparse_bitmasks() -> None:
    """Bitmaps as version 0.12 of the library wrote them, bit 0 for the first column."""
    dense = torch.tensor([[1.0, 0, 2, 0, 0, 3, 4, 0], [0, 0, -5, 6, 7, 8, 0, 0]])
    values = torch.tensor([1.0, 2, 3, 4, -5, 6, 7, 8])
    bitmask = torch.tensor([[0b01100101], [0b00111100]], dtype=torch.uint8)
    two_of_four = CompressedTensors(
        "sparse-24-bitmask",
        {"shape": torch.tensor([[2], [8]]), "compressed": values.view(2, 4), "bitmask": bitmask},
        {},
    )
    single = CompressedTensors(
        "sparse-bitmask",
        {
            "shape": torch.tensor([2, 8]),
            "compressed": values,
            "bitmask": bitmask,
            "row_offsets": torch.tensor([0, 4]),
        },
        {},
    )
    for compressed in (two_of_four, single):
        weight = from_compressed_tensors(compressed)
        assert torch.equal(weight.dequantize(), dense)
        written = to_compressed_tensors(weight)
        assert written.tensors.keys() == compressed.tensors.keys()
        for name, wanted in compressed.tensors.items():
            assert equal(written.tensors[name], wanted), name


def test_scales_of_a_tensor_and_of_blocks() -> None:
    values = torch.randn(256, 384).to(torch.float8_e4m3fn)
    for strategy, scales, spread in (
        ({"strategy": "tensor"}, torch.rand(1), lambda s: s.view(1, 1)),
        (
            {"strategy": "block", "block_structure": [128, 128]},
            torch.rand(2, 3),
            lambda s: s.repeat_interleave(128, 0).repeat_interleave(128, 1),
        ),
    ):
        scheme = {"weights": {"num_bits": 8, "type": "float", "symmetric": True, **strategy}}
        activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
        compressed = CompressedTensors(
            "float-quantized",
            {"weight": values, "weight_scale": scales},
            {**scheme, "input_activations": activations},
        )
        weight = from_compressed_tensors(compressed)
        assert torch.equal(weight.dequantize(), values.float() * spread(scales))


def test_columns_in_order_need_no_index() -> None:
    weight = Int4.pack(torch.randn(4, 128), 32)
    compressed = to_compressed_tensors(weight)
    for index in (torch.arange(128) // 32, torch.full((128,), -1)):
        tensors = {**compressed.tensors, "weight_g_idx": index.int()}
        assert same(from_compressed_tensors(replace(compressed, tensors=tensors)), weight)
    shuffled = {**compressed.tensors, "weight_g_idx": torch.arange(128).int() % 4}
    with pytest.raises(ValueError, match="weight_g_idx must be in order"):
        from_compressed_tensors(replace(compressed, tensors=shuffled))


INT8_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = INT8_TOKENS | {"dynamic": False}


@pytest.mark.parametrize(
    ("maker", "changes", "message"),
    [
        ("int4", {"format": "marlin-24"}, "format must be pack-quantized.* not 'marlin-24'"),
        ("int4", {"tensors": {"weight_scale": None}}, "weight_scale is missing"),
        ("int4", {"tensors": {"weight_global_scale": torch.ones(1)}}, "no tensors .* weight_global_scale"),
        ("int4", {"tensors": {"weight_shape": torch.tensor([5, 200])}}, "weight_packed must be int32 .* 25"),
        ("int4", {"weights": {"num_bits": 9}}, "2 to 8 bits, not int of 9"),
        ("int4", {"weights": {"group_size": 16}}, "group_size must be one of .* not 16"),
        ("int4", {"weights": {"symmetric": False}}, "weight_zero_point is missing"),
        ("int4", {"weights": {"strategy": "tensor_group"}}, "strategy must be .* not tensor_group"),
        ("int4", {"scheme": {"weights": None}}, "scheme must say under"),
        ("int4", {"scheme": {"input_activations": INT8_TOKENS}}, "input_activations must be absent"),
        ("int4", {"scheme": {"output_activations": INT8_TOKENS}}, "output_activations must be absent"),
        (
            "w8a8",
            {"scheme": {"input_activations": INT8_TOKENS | {"dynamic": False}}},
            "not {'dynamic': False}",
        ),
        ("w8a8", {"tensors": {"weight_zero_point": torch.ones(5, 1).char()}}, "must be symmetric"),
        ("fp8", {"scheme": {"input_activations": INT8_TOKENS}}, "activations of type float"),
        (
            "sparse24",
            {"tensors": {"bitmask": torch.full((5, 24), 7, dtype=torch.uint8)}},
            "two bits for each",
        ),
    ],
)
def test_refusals(maker: str, changes: dict[str, Any], message: str) -> None:
    compressed = to_compressed_tensors(MAKERS[maker](torch.randn(5, 192)))
    tensors = {**compressed.tensors, **changes.get("tensors", {})}
    scheme = {**compressed.scheme, **changes.get("scheme", {})}
    if "weights" in changes:
        scheme["weights"] = {**scheme["weights"], **changes["weights"]}
    changed = CompressedTensors(
        changes.get("format", compressed.format),
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        scheme,
    )
    with pytest.raises(ValueError, match=message):
        from_compressed_tensors(changed)


def test_what_no_layout_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="none for NF4"):
        to_compressed_tensors(NF4.pack(torch.randn(4, 64)))
    weight = Int4.pack(torch.randn(4, 64), 32, symmetric=False)
    assert weight.zeros is not None
    for zeros in (weight.zeros + 0.5, weight.zeros * 0 + 16):
        with pytest.raises(ValueError, match="zeros must be whole numbers of 4 bits"):
            to_compressed_tensors(replace(weight, zeros=zeros))
