"""The CPU's kernels that torch has no operator for, written in Python and compiled by numba.

Import a module of this package only when a kernel is needed: numba takes half a second.
"""

from pathlib import Path

from fastserve_kernels.cpu.kernels.kernel_cache import choose_cache_directory

choose_cache_directory(Path(__file__).parent)
