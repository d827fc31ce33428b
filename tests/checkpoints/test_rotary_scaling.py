"""Rotary embeddings that are scaled: how long a sequence they serve, and which frequencies a GGUF file has.

transformers 5.23 drops the scaling of a GGUF file without a word, both the keys and `rope_freqs.weight`. So
there is no reference to compare with, and the frequencies are computed here from the papers' formulas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from fastserve.checkpoints.gguf_config import gguf_decoder_config
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_metadata import context_length
from fastserve.models.decoder import Decoder
from fastserve.models.model_loader import load_model

BASE, ROTATED = 10000.0, 16
SIZES = {"hidden_size": 64, "intermediate_size": 96}
UNSCALED = [BASE ** (-2 * i / ROTATED) for i in range(ROTATED // 2)]
YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def yarn_frequencies(factor: float, original: int, beta_fast: float, beta_slow: float) -> list[float]:
    """Of arXiv 2309.00071, with the bounds of the ramp on whole dimensions as its authors' code has them."""

    def dimension(rotations: float) -> float:
        return ROTATED * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = max(math.floor(dimension(beta_fast)), 0), min(math.ceil(dimension(beta_slow)), ROTATED - 1)
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(ROTATED // 2)]
    return [
        frequency / factor * share + frequency * (1 - share)
        for frequency, share in zip(UNSCALED, ramp, strict=True)
    ]


@pytest.mark.parametrize(
    ("length", "rope", "expected"),
    [
        # Qwen2.5's way: max_position_embeddings is the original length, and stays when YaRN is switched on.
        (64, YARN | ORIGINAL, 256),
        # DeepSeek's and gpt-oss's way: max_position_embeddings is the lengthened one already.
        (256, YARN | ORIGINAL, 256),
        (64, YARN, 256),
        (300, YARN | ORIGINAL, 300),
        # As transformers documents the flag: "don't update max_position_embeddings to the new maximum".
        (64, LINEAR, 256),
        (256, LINEAR | ORIGINAL, 256),
        (256, LLAMA3 | ORIGINAL, 256),
        # The frequencies of these follow the longest sequence of a batch.
        (64, {"rope_type": "dynamic", "factor": 4.0}, 64),
    ],
)
def test_lengths(length: int, rope: dict[str, Any], expected: int, tmp_path: Path) -> None:
    config = {"model_type": "llama", "max_position_embeddings": length, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == expected


def test_gemma_3_names_the_lengthened_context_beside_linear_scaling(tmp_path: Path) -> None:
    """Its factor of 8 belongs to the layers without a window, and 131,072 is what it was trained up to."""
    config = {"model_type": "gemma3_text", "max_position_embeddings": 256, "rope_scaling": LINEAR}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == 256


@pytest.mark.parametrize("rope", [YARN | ORIGINAL, LINEAR])
def test_logits_beyond_the_original_length(
    rope: dict[str, Any],
    save_model: Callable,
    logits_over_paged_cache: Callable,
    transformers_logits: Callable,
) -> None:
    directory, reference = save_model(
        "llama", max_position_embeddings=64, rope_parameters=rope | {"rope_theta": BASE}
    )
    model = load_model(str(directory))
    assert model.max_position == 256
    sequence = torch.randint(3, 199, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    found = logits_over_paged_cache(model, [sequence])
    torch.testing.assert_close(found[0], transformers_logits(reference, [sequence])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("metadata", "frequencies", "scale", "length"),
    [
        ({}, UNSCALED, 1.0, 256),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, UNSCALED, 1.0, 256),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            [frequency / 4 for frequency in UNSCALED],
            1.0,
            1024,
        ),
        # llama.cpp takes a factor without a type for linear, and so does it the key of its first files.
        ({"rope.scaling.factor": 4.0}, [frequency / 4 for frequency in UNSCALED], 1.0, 1024),
        ({"rope.scale_linear": 2.0}, [frequency / 2 for frequency in UNSCALED], 1.0, 512),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            },
            yarn_frequencies(4.0, 64, 32.0, 1.0),
            0.1 * math.log(4.0) + 1.0,
            256,
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.attn_factor": 1.5,
            },
            yarn_frequencies(8.0, 256, 16.0, 2.0),
            1.5 * (0.1 * math.log(8.0) + 1.0),
            2048,
        ),
    ],
)
def test_gguf_scaling_by_keys(
    metadata: dict[str, Any],
    frequencies: list[float],
    scale: float,
    length: int,
    save_model: Callable,
    write_gguf: Callable,
) -> None:
    """Lost, every token beyond the first few would be read at a wrong place, and no error would tell."""
    _, reference = save_model("llama", **SIZES)
    path = write_gguf(reference, "llama", Type.F32, metadata)
    config = gguf_decoder_config(GgufFile(path))
    assert config.inv_freq == pytest.approx(frequencies, rel=1e-6)
    assert config.attention_scaling == pytest.approx(scale)
    assert context_length(path) == length
    model = load_model(str(path))
    assert isinstance(model, Decoder)
    assert (model.config, model.max_position) == (config, length)


def test_gguf_scaling_by_divisors(save_model: Callable, write_gguf: Callable) -> None:
    """llama.cpp stores Llama 3's scaling as a divisor for each frequency, and no key says so."""
    _, reference = save_model("llama", **SIZES)
    divisors = torch.tensor([1.0, 1.0, 1.0, 1.5, 3.0, 8.0, 8.0, 8.0])
    path = write_gguf(reference, "llama", Type.F32, tensors={"rope_freqs.weight": divisors})
    expected = [frequency / divisor for frequency, divisor in zip(UNSCALED, divisors.tolist(), strict=True)]
    assert gguf_decoder_config(GgufFile(path)).inv_freq == pytest.approx(expected, rel=1e-6)
    model = load_model(str(path))
    assert isinstance(model, Decoder)
    assert model.config.inv_freq == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.scaling.type": "longrope"}, "rotary scaling of type 'longrope' is not one of none, linear"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_ext_factor": 0.5},
            r"llama\.rope\.scaling\.yarn_ext_factor: got 0\.5; allowed: 1\.0",
        ),
        ({"rope.dimension_count": 8}, "only a part of each head is rotated"),
    ],
)
def test_gguf_scaling_that_is_not_computed_is_refused(
    metadata: dict[str, Any], message: str, save_model: Callable, write_gguf: Callable
) -> None:
    _, reference = save_model("llama", **SIZES)
    path = write_gguf(reference, "llama", Type.F32, metadata)
    with pytest.raises(ModelError, match=message):
        load_model(str(path))


def test_gguf_longrope_of_phi_3(
    save_model: Callable,
    write_gguf: Callable,
    equals_transformers: Callable,
) -> None:
    """The factors are tensors; it is served up to the original length, as the directory is."""
    short, long = [1.0 + 0.1 * i for i in range(8)], [4.0 + i for i in range(8)]
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "rope_theta": BASE}
    _, reference = save_model("phi3", **SIZES, rope_parameters=rope, original_max_position_embeddings=64)
    scale = math.sqrt(1 + math.log(256 / 64) / math.log(64))
    path = write_gguf(
        reference,
        "phi3",
        Type.F32,
        {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": scale},
        {
            "rope_factors_short.weight": torch.tensor(short),
            "rope_factors_long.weight": torch.tensor(long),
        },
    )
    model = load_model(str(path), "float32")
    assert model.max_position == context_length(path) == 64
    equals_transformers(model, reference)
