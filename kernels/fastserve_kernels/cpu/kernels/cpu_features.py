"""What the kernels of the linears need of a processor."""

from __future__ import annotations

import functools
from collections.abc import Mapping

FEATURES = ("avx512bw", "avx512bf16", "avx512vbmi", "avx512vnni")
"""The extensions of AVX-512, as LLVM names them, that AMD has had since Zen 4 and Intel since Sapphire
Rapids."""


@functools.cache
def host_features() -> Mapping[str, bool]:
    """The features of this machine's processor."""
    import llvmlite.binding

    features: Mapping[str, bool] = llvmlite.binding.get_host_cpu_features()
    return features


def supported(features: Mapping[str, bool]) -> bool:
    """Whether a processor of these features has all that is needed."""
    return all(features.get(name, False) for name in FEATURES)
