"""The examples as modules, and one loaded model for all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve import Model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session", autouse=True)
def examples() -> Iterator[Path]:
    """Their folder; they can be imported, as with PYTHONPATH=examples."""
    sys.path.insert(0, str(EXAMPLES))
    yield EXAMPLES
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def model(default_model_path: Path, examples: Path) -> Model:
    """One place in the batch, and the policy of `custom_policy.py` to give it away."""
    return Model.load(
        str(default_model_path),
        kv_cache_bytes=1 << 26,
        max_num_seqs=1,
        policy=f"{examples}/custom_policy.py:earliest_deadline_first",
    )
