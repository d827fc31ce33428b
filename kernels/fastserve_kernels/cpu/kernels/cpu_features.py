"""What the kernels need of a processor, and what numba compiles them for.

That is this machine's processor, unless numba is told otherwise: NUMBA_CPU_FEATURES names the features
(`+avx2,+fma`), NUMBA_CPU_NAME the processor whose others LLVM then adds. Only what is named is used here. So
kernels for a lesser processor run on this one too: with NUMBA_CPU_NAME=haswell and
NUMBA_CPU_FEATURES=+avx2,+fma,+f16c nothing of AVX-512 is left.
"""

from __future__ import annotations

import functools

FLOAT_PRODUCTS = ("avx512bw", "avx512bf16", "avx512vbmi", "avx512vnni")
"""What the linears need that multiply by floats, which they look up for each code: extensions of AVX-512, as
LLVM names them, that AMD has had since Zen 4 and Intel since Sapphire Rapids."""
INTEGER_PRODUCTS = ("avx2", "fma", "f16c")
"""What those of activations of 8 bits need: AMD has had it since Excavator, Intel since Haswell. They use
VNNI too where it is there."""

Features = frozenset[str]


@functools.cache
def compiled_features() -> Features:
    """The features that numba compiles for."""
    from numba.core import config  # here: numba takes half a second, which a GPU does without
    from numba.core.codegen import get_host_cpu_features

    told: str | None = vars(config)["CPU_FEATURES"]
    named: str = get_host_cpu_features() if told is None else told
    return frozenset(name[1:] for name in named.split(",") if name.startswith("+"))


def has(*names: str) -> bool:
    """Whether kernels are compiled for a processor with all these features."""
    return compiled_features().issuperset(names)


def has_wide_vnni() -> bool:
    """Whether VNNI multiplies bytes in registers of AVX-512."""
    return has("avx512bw", "avx512vnni")


def has_vnni() -> bool:
    """Whether it does in any registers."""
    return has_wide_vnni() or has("avxvnni") or has("avx512vnni", "avx512vl")
