"""What a checkpoint says of its KV cache, and the scale of least error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastserve.checkpoints.kv_cache_scheme import (
    KVCacheScheme,
    KVCacheShapes,
    kv_cache_scheme,
    read_kv_cache_scheme,
)
from fastserve.checkpoints.model_error import ModelError
from fastserve.engine.kv_scales import measure_scales
from fastserve.evaluation.evaluation import SequenceRunner
from fastserve.models.kv_cache import QUANTIZED_MAX
from fastserve.models.kv_cache_quantization import (
    candidate_scales,
    fake_quantize,
    least_error,
    squared_errors,
)
from fastserve.models.model_loader import load_model
from fastserve_kernels import ops
from fastserve_kernels.kv_cache import KVCache

SHAPES: KVCacheShapes = [((1, 1, 2, 12), (1, 1, 2, 12))] * 3
DTYPES = tuple(QUANTIZED_MAX)

WithScheme = Callable[..., Path]


@pytest.fixture
def with_scheme(save_model: Callable) -> WithScheme:
    """A checkpoint with this scheme, and each layer's k_scale and v_scale of this shape: 1, 2, 3, ..."""

    def save(scheme: object, shape: tuple[int, ...] | None = (1,)) -> Path:
        directory, _ = save_model("llama")
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
        (directory / "config.json").write_text(json.dumps(config))
        if shape is not None:
            scales = {
                f"model.layers.{layer}.self_attn.{kind}_scale": torch.full(shape, 1.0 + layer)
                for layer in range(3)
                for kind in "kv"
            }
            path = directory / "model.safetensors"
            save_file(load_file(path) | scales, path, {"format": "pt"})
        return directory

    return save


def read(directory: Path) -> KVCacheScheme:
    scheme = read_kv_cache_scheme(directory, SHAPES)
    assert scheme is not None
    return scheme


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1, 1)])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_scales_of_a_layer_or_of_its_heads_are_read(
    with_scheme: WithScheme, dtype: str, shape: tuple[int, ...]
) -> None:
    scheme = read(with_scheme(kv_cache_scheme(dtype, "head"), shape))
    assert scheme.dtype == dtype
    assert scheme.scales is not None
    assert [scales.k.tolist() for scales in scheme.scales] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert [scales.v.tolist() for scales in scheme.scales] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_a_scheme_as_llm_compressor_writes_it(with_scheme: WithScheme) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)
    assert read(with_scheme(args.model_dump(mode="json"))).dtype == "fp8"


def test_our_schemes_are_those_of_compressed_tensors() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for dtype, per in (("int8", "head"), ("fp8", "layer")):
        args = quantization.QuantizationArgs.model_validate(kv_cache_scheme(dtype, per))
        assert (args.num_bits, args.symmetric, args.dynamic) == (8, True, False)


def test_a_checkpoint_may_say_nothing(save_model: Callable) -> None:
    directory, _ = save_model("llama")
    assert read_kv_cache_scheme(directory, SHAPES) is None


def test_a_scheme_may_have_no_scales(with_scheme: WithScheme) -> None:
    assert read(with_scheme(kv_cache_scheme("fp8", "layer"), None)) == KVCacheScheme("fp8", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_bits", 4), ("symmetric", False), ("dynamic", True), ("strategy", "channel"), ("type", "nf")],
)
def test_another_scheme_is_refused_by_field(with_scheme: WithScheme, field: str, value: Any) -> None:
    directory = with_scheme({**kv_cache_scheme("int8", "layer"), field: value})
    with pytest.raises(ModelError, match=rf"kv_cache_scheme\.{field}: got {value!r}; allowed"):
        read(directory)


def test_a_scheme_of_another_kind_is_refused(with_scheme: WithScheme) -> None:
    with pytest.raises(ModelError, match="kv_cache_scheme: got 'static'"):
        read(with_scheme("static"))


def test_scales_of_another_number_of_heads_are_refused(with_scheme: WithScheme) -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_scale: got .* each of 2 heads"):
        read(with_scheme(kv_cache_scheme("int8", "head"), (3,)))


def test_a_missing_scale_is_named(with_scheme: WithScheme) -> None:
    directory = with_scheme(kv_cache_scheme("int8", "layer"))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"missing or too many: layers\.1\.v_scale"):
        read(directory)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_the_cache(dtype: torch.dtype) -> None:
    x = torch.randn(20, 2, 16) * 30
    scale = torch.tensor([0.1, 0.03])
    cache = torch.zeros(2, 16, 2, 16, dtype=dtype)
    ops.write_kv(x, x, KVCache(cache, cache.clone(), scale, scale), torch.arange(20))
    stored = cache.flatten(0, 1)[:20].float() * scale[:, None]
    assert torch.equal(fake_quantize(x, scale, dtype), stored)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_no_scale_tried_is_better_than_the_chosen_one(dtype: torch.dtype, data: Any) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(8, 3, 4, generator=generator) * data.draw(st.sampled_from([1e-6, 1.0, 1e4]))
    candidates = candidate_scales(x.abs().amax((0, 2)), dtype)
    chosen = least_error(candidates, squared_errors(x, candidates, dtype))

    def error(scale: Tensor) -> Tensor:
        return (fake_quantize(x, scale, dtype) - x).square().sum((0, 2))

    assert all((error(chosen) <= error(scale)).all() for scale in candidates)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_over_a_cache_of_8_bits_are_close(
    save_model: Callable, sequences: list[list[int]], family: str, dtype: torch.dtype
) -> None:
    model = load_model(str(save_model(family)[0]))
    token_ids = torch.tensor(sequences[0])
    scales = measure_scales(model, dtype, token_ids[None])
    exact, found = (
        model.logits(SequenceRunner(model, len(token_ids), kv_cache).hidden(token_ids[None])[0])
        for kv_cache in (None, (dtype, scales))
    )
    difference = (found - exact).norm() / (exact - exact.mean(-1, keepdim=True)).norm()
    assert 0 < difference < {torch.int8: 0.05, torch.float8_e4m3fn: 0.1}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_of_zeros_has_a_scale_too(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 2, 8)
    candidates = candidate_scales(x.abs().amax((0, 2)), dtype)
    assert (least_error(candidates, squared_errors(x, candidates, dtype)) > 0).all()
