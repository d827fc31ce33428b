"""`fastserve compress`, and a real server with what it wrote."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.conftest import running

from fastserve import Model, cli
from fastserve.checkpoints.model_files import locate
from fastserve.compression.recipe import PRESETS
from fastserve_client import Client

PROMPT = "The capital of France is"


def presets(soak: bool) -> tuple[str, ...]:
    """Those that are tried: the one that measures nothing, or all."""
    return tuple(PRESETS) if soak else ("nf4",)


def test_presets_are_served_and_say_what_they_say_in_process(soak: bool, tmp_path: Path) -> None:
    for preset in presets(soak):
        directory = tmp_path / preset
        words = ["compress", "--preset", preset, "--out", str(directory), "--evaluate", "none"]
        assert cli.main([*words, "--samples", "32" if soak else "2"]) == 0
        expected = Model.load(str(directory), kv_cache_bytes=1 << 26).predict(
            PROMPT, temperature=0, max_tokens=20
        )
        with running(locate(str(directory))) as server, Client(server.grpc_url) as client:
            assert client.generate(PROMPT, temperature=0, max_tokens=20).text == expected
        if preset not in ("small", "lowrank"):  # too much is lost there to know it
            assert "Paris" in expected
