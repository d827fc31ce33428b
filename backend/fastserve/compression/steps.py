"""All steps that a recipe may have, by name."""

from __future__ import annotations

from typing import get_args

from fastserve.compression.low_rank.low_rank_step import LowRankStep
from fastserve.compression.pruning.admm import Admm
from fastserve.compression.pruning.magnitude import Magnitude
from fastserve.compression.pruning.sparsegpt import SparseGpt
from fastserve.compression.pruning.structure import Structure
from fastserve.compression.pruning.wanda import Wanda
from fastserve.compression.quantization.awq import Awq
from fastserve.compression.quantization.codebooks import Codebook
from fastserve.compression.quantization.embedding import Embedding
from fastserve.compression.quantization.gptq import Gptq
from fastserve.compression.quantization.kv_cache_step import KVCacheScales
from fastserve.compression.quantization.mixed_precision import MixedPrecision
from fastserve.compression.quantization.round_to_nearest import Round
from fastserve.compression.quantization.w8a8 import W8A8Step
from fastserve.compression.step import Step
from fastserve.compression.training.distill import Distill
from fastserve.compression.training.retrain import Retrain

AnyStep = (
    Admm
    | Awq
    | Codebook
    | Distill
    | Embedding
    | Gptq
    | KVCacheScales
    | LowRankStep
    | Magnitude
    | MixedPrecision
    | Retrain
    | Round
    | SparseGpt
    | Structure
    | W8A8Step
    | Wanda
)
"""The union that steps of a recipe are decoded to, by their tags."""
STEPS: dict[str, type[Step]] = {str(kind.__struct_config__.tag): kind for kind in get_args(AnyStep)}
