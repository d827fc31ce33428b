"""Smoothing of weights and activations that are both rounded to 8 bits.

Some elements of an encoder's hidden states are a hundred times as large as the others, in every text, and
where a token's elements share a scale these round the others away. But x W^T + b = ((x - z) / s) (W s)^T +
(b + z W^T): a column's shift z takes away what is always there (Outlier Suppression+, arXiv 2304.09145), and
its factor s moves what is large from the activations, which have a scale a token, to the weights, which have
one a row (SmoothQuant, arXiv 2211.10438): s_j = max|x_j - z_j|^a / max|W_j|^(1 - a). What text gives is
measured when the model is loaded; of the strengths `a`, with and without a shift, the one of the least error
is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastserve.corpus.windows import calibration_text
from fastserve.encoders.encoder_model import EncoderModel, Projection
from fastserve.encoders.encoder_tokenizer import EncoderTokenizer
from fastserve.encoders.ragged_batch import RaggedBatch
from fastserve.models.linear import Linear
from fastserve_kernels.formats import W8A8
from fastserve_kernels.preparation import prepare

PROJECTIONS = ("qkv_proj", "o_proj", "up_proj", "down_proj")
STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""What `a` may be; 0 stands for no smoothing."""
NUM_TEXTS = 48
TEXT_TOKENS = 24
"""Of each text, at most."""
SMALLEST = 1e-5
"""What the largest element of a column of zeros counts as."""

Inputs = Mapping[tuple[int, str], Tensor]
"""The inputs [tokens, K] of each projection, by layer and name."""


@dataclass(frozen=True)
class Smoothing:
    """Of the columns of one weight: [K] float32 each."""

    factors: Tensor
    shift: Tensor


class SmoothedLinear:
    """A linear layer whose weight has been multiplied by factors, column by column."""

    def __init__(self, smoothing: Smoothing, weight: Tensor, linear: Linear) -> None:
        """`weight` [N, K] as it was; `linear`: by the weight times the factors, with the bias as it was."""
        inverse = 1.0 / smoothing.factors
        self._inverse = inverse.to(weight.dtype)
        self._added = (-smoothing.shift * inverse).to(weight.dtype)
        bias = weight.float() @ smoothing.shift
        if linear.bias is not None:
            bias += linear.bias.float()
        self._linear = replace(linear, bias=bias.to(weight.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K]: x W^T + b, [T, N]."""
        return self._linear(torch.addcmul(self._added, x, self._inverse))


def observe_inputs(model: EncoderModel, tokenizer: EncoderTokenizer) -> Inputs:
    """What the projections of a model that is not rounded are given for some text."""
    found: dict[tuple[int, str], Tensor] = {}

    def observing(key: tuple[int, str], projection: Projection) -> Projection:
        def call(x: Tensor) -> Tensor:
            found[key] = x.detach().clone()
            return projection(x)

        return call

    layers = [
        replace(layer, **{name: observing((index, name), getattr(layer, name)) for name in PROJECTIONS})
        for index, layer in enumerate(model.weights.layers)
    ]
    length = min(TEXT_TOKENS, model.max_length)
    sequences = tokenizer.encode(_calibration_texts(), length, True, "texts")
    observed = EncoderModel(model.config, replace(model.weights, layers=layers))
    observed.forward(RaggedBatch.build(sequences, model.device))
    return found


def _calibration_texts() -> list[str]:
    """Paragraphs from all over the text."""
    paragraphs = [text for text in calibration_text().split("\n\n") if text.strip()]
    return paragraphs[:: -(-len(paragraphs) // NUM_TEXTS)]


@torch.inference_mode()
def best_smoothing(x: Tensor, weight: Tensor) -> Smoothing:
    """That of the least error, for inputs x [tokens, K] and a weight [N, K]."""
    exact = x.float() @ weight.float().T
    middle = (x.float().amax(0) + x.float().amin(0)) / 2
    tried = [
        _smoothing(x.float(), weight.float(), shift, strength)
        for shift in (torch.zeros_like(middle), middle)
        for strength in STRENGTHS
    ]
    return min(tried, key=lambda smoothing: _error(smoothing, x, weight, exact))


def _smoothing(x: Tensor, weight: Tensor, shift: Tensor, strength: float) -> Smoothing:
    if strength == 0:
        return Smoothing(torch.ones_like(shift), shift)
    most_x = (x - shift).abs().amax(0).clamp(min=SMALLEST)
    most_w = weight.abs().amax(0).clamp(min=SMALLEST)
    return Smoothing(most_x**strength / most_w ** (1 - strength), shift)


def _error(smoothing: Smoothing, x: Tensor, weight: Tensor, exact: Tensor) -> float:
    packed = prepare(W8A8.pack(weight.float() * smoothing.factors), x.device, x.dtype)
    linear = SmoothedLinear(smoothing, weight, Linear(packed, None))
    return float((linear(x).float() - exact).norm())
