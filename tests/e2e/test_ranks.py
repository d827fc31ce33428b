"""A model that two processes compute, on the real server: whoever of them is killed, it serves again."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastserve.checkpoints.model_files import ModelFiles
from fastserve_client import Client, FastServeError

STREAMS = 8
SAMPLING: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module", params=["tensor_parallel_size", "pipeline_parallel_size"])
def ranked(
    request: Any, launch: Any, default_model: ModelFiles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A random model of four heads, which two ranks can share, with the default model's tokenizer."""
    directory = tmp_path_factory.mktemp("ranked") / "model"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in default_model.tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special", "chat")):
            shutil.copy(file, directory)
    files, settings = ModelFiles(directory, directory), {"kv_cache_bytes": 1 << 27, "quantization": "int8"}
    with launch.func(files, **{request.param: 2}, **settings) as server:
        yield server


def processes_of(server: Any, words: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(server.launcher.process.pid).children(recursive=True):
        if words in " ".join(child.cmdline()):
            found.append(child)
    return found


@pytest.mark.parametrize("victim", ["rank_process", "multiprocessing.spawn"], ids=["rank 1", "rank 0"])
def test_a_rank_that_is_killed_ends_its_streams_and_no_more(ranked: Any, victim: str) -> None:
    ended: list[float] = []
    errors: list[str] = []
    started = threading.Barrier(STREAMS + 1)

    def stream(number: int) -> None:
        with Client(ranked.grpc_url, retries=0) as client:
            chunks = client.stream(f"Story number {number}:", max_tokens=1900, **SAMPLING)
            next(chunks)
            started.wait(60)
            try:
                for _ in chunks:
                    pass
            except FastServeError as error:
                errors.append(str(error))
            ended.append(time.monotonic())

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    started.wait(60)
    group = [*processes_of(ranked, "rank_process"), *processes_of(ranked, "multiprocessing.spawn")]
    assert len(group) == 2
    killed = time.monotonic()
    os.kill(processes_of(ranked, victim)[0].pid, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert len(errors) == STREAMS
    assert max(ended) - killed < 2
    with Client(ranked.grpc_url, retries=0) as client:
        while True:
            try:
                client.generate("Again", max_tokens=4, **SAMPLING)
                break
            except FastServeError:
                assert time.monotonic() - killed < 20
    assert time.monotonic() - killed < 20
    gone, alive = psutil.wait_procs(group, timeout=5)
    assert (len(gone), alive) == (2, [])
    assert len(processes_of(ranked, "rank_process")) == 1
    assert not [path for path in Path("/dev/shm").iterdir() if "ranks" in path.name or "stages" in path.name]
