"""Smoothing of weights and activations that are both rounded to 8 bits.

Some elements of an encoder's hidden states are a hundred times as large as the others, in every text, and
where a token's elements share a scale these round the others away. But x W^T + b = ((x - z) / s) (W s)^T +
(b + z W^T): a column's shift z takes away what is always there (Outlier Suppression+, arXiv 2304.09145), and
its factor s moves what is large from the activations, which have a scale a token, to the weights, which have
one a row (SmoothQuant, arXiv 2211.10438): s_j = max|x_j - z_j|^a / max|W_j|^(1 - a). What text gives is
measured when the model is loaded; of the strengths `a`, with and without a shift, the one of the least error
is taken. What is left of that error on average goes into the bias (Nagel et al., arXiv 1906.04721): the mean
over a text's tokens takes away the rest, but not this.

A projection whose inputs these do not smooth, such as what GELU gives, is held as int8 in groups of columns,
each with scales of its own on both sides: half as slow again, so it must leave clearly less error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.corpus.windows import calibration_text
from fastserve.encoders.encoder_model import EncoderModel, Projection
from fastserve.encoders.encoder_tokenizer import EncoderTokenizer
from fastserve.encoders.ragged_batch import RaggedBatch
from fastserve.models.linear import Linear
from fastserve_kernels.cpu.kernels.cpu_features import INTEGER_PRODUCTS, has
from fastserve_kernels.formats import W8A8, Int8, Weight
from fastserve_kernels.preparation import prepare

Pack = Callable[[Tensor], Weight]


class _Smoothing(NamedTuple):
    """Of the columns of one weight."""

    factors: Tensor
    """[K] float32."""
    shift: Tensor
    """[K] float32."""
    pack: Pack
    """To the format of the weight."""


STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""What `a` may be."""
GROUP_SIZE = 64
"""Columns of a group."""
NUM_TEXTS = 48
TEXT_TOKENS = 24
"""Of each text, at most."""
SMALLEST = 1e-5
"""What the largest element of a column of zeros counts as."""

WORTH_GROUPS = 0.75
"""Of the error that is left with a scale a token: groups are taken where they leave no more."""

Inputs = Mapping[tuple[int, str], Tensor]
"""The inputs [tokens, K] of each projection, by layer and name."""


def observe_inputs(model: EncoderModel, tokenizer: EncoderTokenizer) -> Inputs:
    """What the projections of a model that is not rounded are given for some text."""
    found: dict[tuple[int, str], Tensor] = {}

    def observing(key: tuple[int, str], projection: Projection) -> Projection:
        def call(x: Tensor) -> Tensor:
            found[key] = x.detach().clone()
            return projection(x)

        return call

    layers = [
        replace(
            layer,
            qkv_proj=observing((index, "qkv_proj"), layer.qkv_proj),
            o_proj=observing((index, "o_proj"), layer.o_proj),
            up_proj=observing((index, "up_proj"), layer.up_proj),
            down_proj=observing((index, "down_proj"), layer.down_proj),
        )
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


class SmoothedLinear:
    """A linear layer whose weight has been multiplied by factors, column by column, and rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None, smoothing: _Smoothing) -> None:
        """`weight` [N, K] and `bias` [N] as they were."""
        factors, shift, pack = smoothing
        rounded = pack(weight.float() * factors)
        added = weight.float() @ shift + (0.0 if bias is None else bias.float())
        self._linear = Linear(
            prepare(rounded, weight.device, weight.dtype, _rounds_activations(rounded, weight.device)),
            added.to(weight.dtype),
        )
        self._inverse = (1.0 / factors).to(weight.dtype)
        self._added = (-shift / factors).to(weight.dtype)

    def correct_bias(self, error: Tensor) -> None:
        """Takes the mean of an error [tokens, N] away."""
        assert self._linear.bias is not None
        corrected = self._linear.bias.float() - error.mean(0)
        self._linear = replace(self._linear, bias=corrected.to(self._linear.bias.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K]: x W^T + b, [T, N]."""
        return self._linear(torch.addcmul(self._added, x, self._inverse))


@torch.inference_mode()
def smoothed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> SmoothedLinear:
    """The linear layer of a weight [N, K] and its bias [N], smoothed for inputs x [tokens, K]."""
    exact = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())

    def tried(pack: Pack) -> tuple[float, SmoothedLinear, Tensor]:
        """(size of the error, layer, error) of the smoothing of the least error."""
        layers = [SmoothedLinear(weight, bias, each) for each in _smoothings(x.float(), weight.float(), pack)]
        errors = [layer(x).float() - exact for layer in layers]
        sizes = [float(error.norm()) for error in errors]
        best = min(range(len(sizes)), key=sizes.__getitem__)
        return sizes[best], layers[best], errors[best]

    size, layer, error = tried(W8A8.pack)
    if weight.shape[1] % GROUP_SIZE == 0:
        grouped = tried(_pack_groups)
        if grouped[0] <= WORTH_GROUPS * size:
            _, layer, error = grouped
    layer.correct_bias(error)
    return layer


def _smoothings(x: Tensor, weight: Tensor, pack: Pack) -> Iterator[_Smoothing]:
    middle = (x.amax(0) + x.amin(0)) / 2
    for shift in (torch.zeros_like(middle), middle):
        most_x = (x - shift).abs().amax(0).clamp(min=SMALLEST)
        most_w = weight.abs().amax(0).clamp(min=SMALLEST)
        yield _Smoothing(torch.ones_like(shift), shift, pack)
        for strength in STRENGTHS:
            yield _Smoothing(most_x**strength / most_w ** (1 - strength), shift, pack)


def _pack_groups(weight: Tensor) -> Weight:
    return Int8.pack(weight, GROUP_SIZE)


def _rounds_activations(weight: Weight, device: torch.device) -> bool:
    """Whether an int8 weight can meet activations of 8 bits there; `W8A8` always does."""
    return isinstance(weight, Int8) and device.type == "cpu" and has(*INTEGER_PRODUCTS)
