"""Random numbers that are a function of a sequence's seed and a token's position alone.

A counter-based generator, as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def uid_seed(uid: str) -> int:
    """The seed of a request whose client gives none: another worker that goes on with it has the same."""
    return int.from_bytes(blake2b(uid.encode(), digest_size=8).digest(), "little")


def sequence_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` of a request: for 0 the request's own, for others a hash of both.

    A sum of both would give two requests of neighboring seeds the same texts.
    """
    own = seed % 2**64
    if index == 0:
        return own
    # No position in a text reaches 2**63, so that no number of this kind is one that a token was drawn with.
    return int(_hash(np.array([own], dtype=np.uint64), np.array([2**63 + index], dtype=np.uint64))[0])


def uniform_numbers(seeds: list[int], positions: list[int]) -> np.ndarray:
    """Uniform numbers [n] float64 in [0, 1), each a hash of its seed and position alone, 53 bits of it."""
    mixed = _hash(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hash(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Two rounds of the SplitMix64 finalizer (Steele, Lea, Flood, OOPSLA 2014) over uint64 [n]."""
    with np.errstate(over="ignore"):
        mixed: np.ndarray = _splitmix(_splitmix(seeds) ^ _splitmix(positions))
    return mixed


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
