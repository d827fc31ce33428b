"""The errors and the size of one linear after a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastserve.compression.calibration.layer import Layer
from fastserve_kernels.formats import LowRank


@dataclass(frozen=True)
class LinearReport:
    """What a step did to a linear. Errors are relative to the linear before the step, on the inputs after
    it."""

    name: str
    """`model.layers.3.mlp.down_proj`."""
    format: str
    """The name of the class in `fastserve_kernels.formats`."""
    bits: float
    """Stored for each weight, scales and indices included."""
    sparsity: float | None
    """Share of the weights that are 0; None if none was left out, in this step or before: a 0 is then a value
    like others."""
    rank: int | None
    """The rank of a `LowRank` weight."""
    weight_error: float | None
    """||W - W'|| / ||W||, Frobenius; None if the shape is another."""
    output_error: float | None
    """sqrt(E||(W - W') x||^2 / E||W x||^2)."""


def linear_report(layer: Layer, name: str) -> LinearReport:
    """The report of a linear of a layer that a step is done with."""
    weight, now, original = layer.weight(name), layer.dense(name), layer.original(name)
    same_shape = now.shape == original.shape
    hessian = layer.latest_moments(name).hessian
    return LinearReport(
        name=f"{layer.prefix}{name}",
        format=type(weight).__name__,
        bits=weight.bits_per_weight,
        sparsity=float((now == 0).float().mean()) if layer.is_pruned(name) else None,
        rank=weight.down.shape[0] if isinstance(weight, LowRank) else None,
        weight_error=float((now - original).norm() / original.norm()) if same_shape else None,
        output_error=output_error(now - original, original, hessian) if same_shape else None,
    )


def output_error(difference: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)) for D and W [N, K] and the Hessian H [K, K] of the inputs."""
    return float((_energy(difference, hessian) / _energy(weight, hessian)).clamp_min(0).sqrt())


def _energy(weight: Tensor, hessian: Tensor) -> Tensor:
    return ((weight @ hessian) * weight).sum()
