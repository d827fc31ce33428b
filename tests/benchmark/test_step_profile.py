"""The profile of a decode step."""

from __future__ import annotations

import pytest

from fastserve.benchmark.step_profile import Machine, profile_steps
from fastserve.config import ConfigError

MACHINE = Machine(1e10, 1e12, 1e11)


def test_the_parts_of_a_step_add_up_to_it() -> None:
    [profile] = profile_steps("", MACHINE, [2], 40, 0)
    assert (profile.num_seqs, profile.context_len) == (2, 40)
    parts = {part.name: part for part in profile.parts}
    assert sum(part.seconds for part in profile.parts) == pytest.approx(profile.seconds)
    assert min(parts[name].seconds for name in ("linears", "attention", "head", "sampling")) > 0
    floors = {name: part.floor for name, part in parts.items() if part.floor is not None}
    assert floors.keys() == {"linears", "attention", "head"}
    num_layers, num_kv_heads, head_dim, size = 30, 3, 64, 2
    assert floors["attention"] == pytest.approx(
        2 * 40 * num_layers * 2 * num_kv_heads * head_dim * size / MACHINE.bytes_per_second
    )


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="1000 sequences of 40 tokens do not fit the engine"):
        list(profile_steps("", MACHINE, [1000], 40, 0))
