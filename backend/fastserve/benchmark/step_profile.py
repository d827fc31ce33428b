"""Where the time of a decode step on a CPU goes, beside the floor: what no program could do it without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fastserve.benchmark.calibration import kv_bytes_per_token
from fastserve.benchmark.engine_driver import EngineDriver
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_files import locate
from fastserve.config import Config, ConfigError
from fastserve.engine.engine_loader import load_engine
from fastserve.engine.sampler import argmax
from fastserve.models.captured_step import capture_step
from fastserve.models.decoder import Decoder
from fastserve.models.kv_cache import KVCaches
from fastserve.models.linear import AnyLinear, parts_of
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.bench.cpu import ceilings
from fastserve_kernels.formats.prepared import Prepared

STEPS = 100
"""Of each measurement; the median counts."""
INTEGER_OPERATORS = ("linear_int4_a8", "linear_int8_a8", "linear_w8a8")
"""Those that multiply bytes."""
PARTS: Mapping[str, str] = {"linear": "linears", "paged_attention": "attention"}
"""By how the names of their kernels begin; all others are the last of `KERNEL_PARTS`."""
KERNEL_PARTS = ("linears", "attention", "norms, rotary embedding, SwiGLU")


@dataclass(frozen=True)
class Part:
    """A part of a step."""

    name: str
    seconds: float
    floor: float | None
    """The least seconds: bytes over the bandwidth of reading, or operations over their peak, whichever is
    more; None where only Python is at work."""


@dataclass(frozen=True)
class StepProfile:
    """A step of so many sequences, each of so many tokens."""

    num_seqs: int
    context_len: int
    seconds: float
    parts: list[Part]
    """Their seconds add up to those of the step."""


@dataclass(frozen=True)
class Machine:
    """What its processors can do at most, all together, as measured."""

    bytes_per_second: float
    """Of reading."""
    byte_products_per_second: float
    bfloat16_products_per_second: float

    @classmethod
    def measure(cls) -> Machine:
        """Takes some seconds."""
        from fastserve_kernels.cpu.kernels.peak import byte_products_per_second

        rates = ceilings()
        products = rates.flops_per_second / 2
        return cls(rates.bytes_per_second, byte_products_per_second(), products)

    def linear_floor(self, weights: list[Prepared], num_rows: int) -> float:
        """Seconds of products of so many rows of activations with weights."""
        seconds = 0.0
        for weight in weights:
            is_integer = weight.operator in INTEGER_OPERATORS
            peak = self.byte_products_per_second if is_integer else self.bfloat16_products_per_second
            products = weight.out_features * weight.in_features * num_rows
            seconds += max(weight.nbytes / self.bytes_per_second, products / peak)
        return seconds


def profile_steps(
    model: str, machine: Machine, num_seqs: list[int], context_len: int, seed: int
) -> Iterator[StepProfile]:
    """A profile for each number of sequences.

    Raises ModelError, also for a model whose decode steps cannot be recorded, and ConfigError if so many
    sequences do not fit the engine.
    """
    config, files = Config(model=model, speculative_method="none"), locate(model)
    engine = load_engine(config, files)
    decoder = engine.runner.model
    if not isinstance(decoder, Decoder):
        raise ModelError("the model is not a decoder of FastServe's own on a CPU")
    driver = EngineDriver(engine, config, seed)
    profiler = _Profiler(decoder, engine.runner.kv_caches, machine, config, context_len)
    for count in num_seqs:
        if not driver.add([context_len] * count):
            raise ConfigError(f"--clients: {count} sequences of {context_len} tokens do not fit the engine")
        for _ in driver.run_prompts():
            pass
        driver.run(3)
        seconds = statistics.median(sample.seconds for sample in driver.run(STEPS))
        driver.clear()
        yield profiler.profile(count, seconds)


class _Profiler:
    def __init__(
        self, decoder: Decoder, kv_caches: KVCaches, machine: Machine, config: Config, context_len: int
    ) -> None:
        self._decoder = decoder
        self._kv_caches = kv_caches
        self._machine = machine
        self._block_size = config.block_size
        self._context_len = context_len
        self._num_blocks = -(-context_len // config.block_size)
        captured = capture_step(decoder, kv_caches, config.max_num_seqs, self._num_blocks, config.block_size)
        if captured is None:
            raise ModelError("the model's decode steps cannot be recorded")
        self._captured = captured
        layers = decoder.weights.layers
        linears = [
            each
            for layer in layers
            for each in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
        ]
        self._weights = [weight for each in linears for weight in _weights(each)]

    def profile(self, num_seqs: int, seconds: float) -> StepProfile:
        """Of a step that takes so long."""
        ids = torch.arange(num_seqs)
        meta = self._metadata(num_seqs)
        hidden = self._captured.forward(ids, meta)
        forward = _median(lambda: self._captured.forward(ids, meta))
        logits = self._decoder.logits(hidden)
        kernels = dict.fromkeys(KERNEL_PARTS, 0.0)
        for name, program in self._captured.program.by_kernel().items():
            part = next((part for start, part in PARTS.items() if name.startswith(start)), KERNEL_PARTS[-1])
            kernels[part] += _median(program.run)
        head = _median(lambda: self._decoder.logits(hidden))
        sampling = _median(lambda: argmax(logits))
        lm_head = self._decoder.weights.lm_head
        assert lm_head is not None, "what is profiled is the whole model, or its first stage"
        cache_bytes = num_seqs * self._context_len * kv_bytes_per_token(self._kv_caches)
        floors = {
            "linears": self._machine.linear_floor(self._weights, num_seqs),
            "attention": cache_bytes / self._machine.bytes_per_second,
        }
        parts = [Part(name, taken, floors.get(name)) for name, taken in kernels.items()]
        parts += [
            Part("between kernels, inputs", forward - sum(kernels.values()), None),
            Part("head", head, self._machine.linear_floor(_weights(lm_head), num_seqs)),
            Part("sampling", sampling, None),
        ]
        rest = seconds - sum(part.seconds for part in parts)
        parts.append(Part("scheduling and the rest of the engine", rest, None))
        return StepProfile(num_seqs, self._context_len, seconds, parts)

    def _metadata(self, num_seqs: int) -> AttentionMetadata:
        """Of sequences that have blocks of their own, as far as there are any."""
        total = self._kv_caches[0].keys.shape[0]
        tables = [
            [(number * self._num_blocks + block) % total for block in range(self._num_blocks)]
            for number in range(num_seqs)
        ]
        return AttentionMetadata.build(
            [1] * num_seqs, [self._context_len] * num_seqs, tables, self._block_size, "cpu"
        )


def _weights(linear: AnyLinear) -> list[Prepared]:
    return [part.weight for part in parts_of(linear)]


def _median(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
