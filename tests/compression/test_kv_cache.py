"""Scales of a KV cache of 8 bits, from calibration text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.compression.conftest import RunStep
from torch import Tensor
from transformers import DynamicCache

from fastserve.checkpoints.kv_cache_scheme import SCHEME
from fastserve.compression.errors import RecipeError
from fastserve.compression.quantization.kv_cache_step import KVCacheScales
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context
from fastserve.models.kv_cache import KV_CACHE_DTYPES, QUANTIZED_MAX
from fastserve.models.kv_cache_quantization import fake_quantize


def cached(source: SourceState, token_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values [tokens, heads, dim] in transformers' own cache."""
    model: Any = source.transformers_model(torch.float32)
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids, past_key_values=cache, use_cache=True)
    return [
        (layer.keys.transpose(1, 2).flatten(0, 1), layer.values.transpose(1, 2).flatten(0, 1))
        for layer in cache.layers
    ]


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize("per", ["head", "layer"])
def test_max_gives_the_largest_magnitude_the_largest_number(
    source: SourceState, context: Context, run_step: RunStep, dtype: Any, per: Any
) -> None:
    after = run_step(KVCacheScales(dtype=dtype, per=per, scales="max"), source)
    for index, states in enumerate(cached(source, context.calibration)):
        for kind, x in zip("kv", states, strict=True):
            scale = after.others(index)[f"self_attn.{kind}_scale"]
            largest = x.abs().amax((0, 2)).reshape(-1, 1, 1) if per == "head" else x.abs().amax().reshape(1)
            torch.testing.assert_close(scale * QUANTIZED_MAX[KV_CACHE_DTYPES[dtype]], largest)


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
def test_least_squares_is_no_worse_than_the_largest_magnitude(
    source: SourceState, context: Context, run_step: RunStep, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastserve.compression.quantization.kv_cache_step.ERRORS_OF_EVERY", 1)
    errors = {}
    for scales in ("max", "mse"):
        after = run_step(KVCacheScales(dtype=dtype, scales=scales), source, scales)
        errors[scales] = [
            (
                fake_quantize(
                    x, after.others(index)[f"self_attn.{kind}_scale"].flatten(), KV_CACHE_DTYPES[dtype]
                )
                - x
            )
            .square()
            .sum()
            for index, states in enumerate(cached(source, context.calibration))
            for kind, x in zip("kv", states, strict=True)
        ]
    pairs = list(zip(errors["mse"], errors["max"], strict=True))
    assert all(mse <= most * 1.0001 for mse, most in pairs)
    # Equal steps cannot be finer for normally distributed numbers, of which none is far out.
    assert dtype == "int8" or any(mse < 0.9 * most for mse, most in pairs)


def test_the_config_names_the_scheme_and_the_rest_stays(source: SourceState, run_step: RunStep) -> None:
    after = run_step(KVCacheScales(dtype="int8"), source)
    assert after.config.quantization_config[SCHEME]["type"] == "int"
    assert after.config.hidden_size == source.config.hidden_size
    for index in range(source.num_layers):
        assert after.layer(index).keys() - source.layer(index).keys() == {
            "self_attn.k_scale",
            "self_attn.v_scale",
        }
        for name, weight in source.linears(index).items():
            assert torch.equal(after.linears(index)[name].dequantize(), weight.dequantize())


def test_a_later_step_keeps_the_scales(source: SourceState, run_step: RunStep) -> None:
    scaled = run_step(KVCacheScales(dtype="int8"), source)
    again = run_step(KVCacheScales(dtype="fp8"), scaled, "again")
    assert again.config.quantization_config[SCHEME]["type"] == "float"
    assert again.layer(0).keys() == scaled.layer(0).keys()


def test_targets_are_refused(source: SourceState) -> None:
    with pytest.raises(RecipeError, match=r"targets: got \*\.mlp\.\*"):
        KVCacheScales(targets=("*.mlp.*",)).check(source.config)
