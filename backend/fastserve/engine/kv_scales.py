"""Which dtype the KV cache has, and the scales of one that is quantized.

Scales are the checkpoint's own where it has them: from the step `kv_cache` of `fastserve compress`, or from
llm-compressor. Else they are measured when the model is loaded: ordinary text runs over a cache of the
model's dtype, and each head's keys and values get the scale that rounds what is found there with the least
error. vLLM takes 1.0 for a missing scale of fp8: that cuts off keys above 448, which models with biased keys
have (Qwen2), and is of no use for int8.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastserve.checkpoints.kv_cache_scheme import KVScales, read_kv_cache_scheme
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_files import ModelFiles
from fastserve.corpus.windows import calibration_text, token_windows
from fastserve.models.causal_lm import CausalLM
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import KV_CACHE_DTYPES, make_kv_caches
from fastserve.models.kv_cache_quantization import candidate_scales, least_error, squared_errors
from fastserve_kernels.attention_metadata import AttentionMetadata

WINDOWS, WINDOW_LENGTH = 4, 256
ERRORS_OF_EVERY = 4
"""One of so many tokens is rounded, with each scale that is tried."""


def choose_kv_cache(
    wanted: str, files: ModelFiles, model: CausalLM
) -> tuple[torch.dtype, list[KVScales] | None]:
    """The dtype of the caches of `model`, and each layer's scales if that is one of 8 bits.

    `wanted`: "int8", "fp8", or "auto": what the checkpoint names, else the model's dtype. Raises ModelError
    if it is not what the checkpoint has scales for.
    """
    parallel = model.parallel if isinstance(model, Decoder) else None
    stage = model.stage if isinstance(model, Decoder) else None
    shapes = model.kv_cache_shapes(1, 1)
    if stage is not None:  # the checkpoint's scales are those of all stages' layers
        shapes = shapes[:1] * stage.num_layers
    if parallel is not None:  # and of all ranks' heads
        shape = (1, 1, parallel.config.num_kv_heads, parallel.config.head_dim)
        shapes = [(shape, shape)] * len(shapes)
    scheme = read_kv_cache_scheme(files.checkpoint, shapes)
    if scheme is not None and wanted not in ("auto", scheme.dtype):
        raise ModelError(
            f"kv_cache_dtype: got {wanted!r}; allowed for {files.checkpoint}: auto, {scheme.dtype}, because "
            "its scales are for that"
        )
    name = wanted if scheme is None else scheme.dtype
    if name == "auto":
        return model.dtype, None
    dtype = KV_CACHE_DTYPES[name]
    if scheme is not None and scheme.scales is not None:
        mine = slice(None) if parallel is None else slice(parallel.kv_heads.start, parallel.kv_heads.stop)
        layers = slice(None) if stage is None else slice(stage.layers.start, stage.layers.stop)
        return dtype, [KVScales(each.k[mine].clone(), each.v[mine].clone()) for each in scheme.scales[layers]]
    if stage is not None:
        raise ModelError(
            f"kv_cache_dtype: got {name!r}; allowed for {files.checkpoint} in several stages: auto, because "
            "it has no scales for that, and no stage can measure them alone"
        )
    return dtype, measure_scales(model, dtype, _windows(files.tokenizer, model))


def _windows(tokenizer: Path, model: CausalLM) -> Tensor:
    """[windows, tokens] int64 of ordinary text."""
    length = min(WINDOW_LENGTH, model.max_position)
    return token_windows(tokenizer, calibration_text(), length, WINDOWS).to(model.device)


@torch.inference_mode()
def measure_scales(model: CausalLM, dtype: torch.dtype, windows: Tensor) -> list[KVScales]:
    """Each layer's scales for a cache of that dtype, from what these tokens [windows, tokens] leave there."""
    count, length = windows.shape
    caches = make_kv_caches(model.kv_cache_shapes(count, length), model.dtype, model.device)
    blocks = [[block] for block in range(count)]
    metadata = AttentionMetadata.build([length] * count, [length] * count, blocks, length, model.device)
    model.forward(windows.flatten(), metadata, caches)
    return [KVScales(_scale(cache.keys, dtype), _scale(cache.values, dtype)) for cache in caches]


def _scale(cached: Tensor, dtype: torch.dtype) -> Tensor:
    """[kv_heads] float32 for [blocks, block_size, kv_heads, head_dim]."""
    x = cached.float().flatten(0, 1)
    candidates = candidate_scales(x.abs().amax((0, 2)), dtype)
    return least_error(candidates, squared_errors(x[::ERRORS_OF_EVERY], candidates, dtype))
