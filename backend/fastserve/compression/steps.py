"""All steps that a recipe may have, by name."""

from __future__ import annotations

from typing import get_args

from fastserve.compression.admm import Admm
from fastserve.compression.awq import Awq
from fastserve.compression.codebooks import Codebook
from fastserve.compression.distill import Distill
from fastserve.compression.embedding import Embedding
from fastserve.compression.gptq import Gptq
from fastserve.compression.kv_cache import KVCacheScales
from fastserve.compression.low_rank import LowRankStep
from fastserve.compression.magnitude import Magnitude
from fastserve.compression.mixed_precision import MixedPrecision
from fastserve.compression.retrain import Retrain
from fastserve.compression.round_to_nearest import Round
from fastserve.compression.sparsegpt import SparseGpt
from fastserve.compression.step import Step
from fastserve.compression.structure import Structure
from fastserve.compression.w8a8 import W8A8Step
from fastserve.compression.wanda import Wanda

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
"""What a recipe is decoded to: the tag of each says which it is."""
STEPS: dict[str, type[Step]] = {str(kind.__struct_config__.tag): kind for kind in get_args(AnyStep)}
