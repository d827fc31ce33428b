"""Random numbers of a sequence: uniform, independent, and others for each seed."""

from __future__ import annotations

import numpy as np

from fastserve.engine.random_numbers import sequence_seed, uniform_numbers


def test_sequences_of_neighboring_seeds_draw_other_numbers() -> None:
    positions = list(range(100))
    streams = {
        (seed, index): uniform_numbers([sequence_seed(seed, index)] * 100, positions)
        for seed in (1005, 1006, 1007, -1, 2**63 - 1)
        for index in range(4)
    }
    numbers = np.concatenate(list(streams.values()))
    assert len(np.unique(numbers)) == len(numbers)
    assert abs(np.corrcoef(list(streams.values())) - np.eye(len(streams))).max() < 0.5


def test_sequence_0_has_the_seed_of_its_request() -> None:
    assert sequence_seed(42, 0) == 42
    assert sequence_seed(-1, 0) == 2**64 - 1


def test_uniform_numbers_are_uniform_and_independent() -> None:
    numbers = uniform_numbers([7] * 20_000, list(range(20_000)))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = [((numbers >= i / 20) & (numbers < (i + 1) / 20)).sum() for i in range(20)]
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts)
    assert chi_square < 45  # 19 degrees of freedom: 0.1 % of honest generators exceed 43.8
    assert uniform_numbers([7], [3])[0] == numbers[3]
    assert uniform_numbers([8], [3])[0] != numbers[3]
