"""All steps that a recipe may have, by name."""

from __future__ import annotations

from fastserve.compression.gptq import Gptq
from fastserve.compression.kv_cache import KVCacheScales
from fastserve.compression.magnitude import Magnitude
from fastserve.compression.step import Step
from fastserve.compression.wanda import Wanda

AnyStep = Gptq | KVCacheScales | Magnitude | Wanda
"""What a recipe is decoded to: the tag of each says which it is."""
STEPS: dict[str, type[Step]] = {str(kind.__struct_config__.tag): kind for kind in (Gptq, KVCacheScales, Magnitude, Wanda)}
