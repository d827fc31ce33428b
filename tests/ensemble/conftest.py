"""The models of the ensemble without Triton server: over a fake of what it gives a Python model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAME = "triton_python_backend_utils"
MODELS = "fastserve.ensemble."


@pytest.fixture
def pb_utils() -> Iterator[Any]:
    """The fake, in place of the real module for this test; tests import the models after they have it.

    What of the models was imported meanwhile holds this fake, and is forgotten with it.
    """
    spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name("fake_pb_utils.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if name == NAME or name.startswith(MODELS):
            del sys.modules[name]
            package, _, attribute = name.rpartition(".")
            if package:
                delattr(sys.modules[package], attribute)  # or `from package import attribute` finds it there


@pytest.fixture
def short_shared_memory(pb_utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is free in `/dev/shm`, the models find it little."""
    from fastserve.ensemble import shared_memory

    monkeypatch.setattr(shared_memory, "SHORT_BYTES", 1 << 62)
