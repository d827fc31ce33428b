"""Recorded kernels do what they did when they were called one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.cpu.recording import Arena, NotRecordableError, record
from fastserve_kernels.kv_cache import KVCache
from fastserve_kernels.operator_definition import CPU_IMPLEMENTATIONS

TOKENS, DIM = 40, 576


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """More than there are cores, too: then some come late, and others have to sleep for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def chain(x: Tensor, weight: Tensor) -> Tensor:
    """Each operator needs all of the one before it."""
    residual = x
    for _ in range(30):
        x, residual = ops.add_rms_norm(x, residual, weight, 1e-6)
        x = ops.rms_norm(x.view(TOKENS, 4, DIM // 4), weight[: DIM // 4], 1e-6).view(TOKENS, DIM)
    return x


def test_a_recording_can_be_replayed_on_other_numbers(threads: int) -> None:
    x, weight = torch.randn(TOKENS, DIM), torch.rand(DIM)
    static = torch.zeros_like(x)
    result, program = record(lambda _: chain(static, weight), TOKENS, CPU_IMPLEMENTATIONS, Arena())
    for _ in range(20):
        x = torch.randn_like(x)
        static.copy_(x)
        program.run()
        assert torch.equal(result, chain(x, weight))


def test_nothing_runs_while_it_is_recorded() -> None:
    x, cache = torch.randn(3, 2, 16), torch.zeros(4, 16, 2, 16)
    slots, caches = torch.tensor([0, 17, 35]), KVCache(cache, cache.clone(), None, None)
    _, program = record(
        lambda _: ops.write_kv(x, x, caches, slots),
        3,
        CPU_IMPLEMENTATIONS,
        Arena(),
    )
    assert not cache.any()
    program.run()
    assert torch.equal(cache.view(-1, 2, 16)[slots], x)


def test_the_memory_of_tensors_that_are_gone_is_used_again() -> None:
    x, weight = torch.randn(TOKENS, DIM), torch.rand(DIM)
    arena = Arena()
    record(lambda _: chain(x, weight), TOKENS, CPU_IMPLEMENTATIONS, arena)
    assert arena.nbytes <= 5 * x.nbytes


def test_a_recording_of_rows_is_replayed_for_any_number(threads: int) -> None:
    x, weight = torch.randn(TOKENS, DIM), torch.rand(DIM)
    result, program = record(lambda rows: layer(x[:rows], weight), TOKENS, CPU_IMPLEMENTATIONS, Arena())
    for rows in [*range(1, TOKENS + 1), 3]:
        x.copy_(torch.randn_like(x))
        program.resize(rows)
        program.run()
        assert torch.equal(result[:rows], layer(x[:rows], weight))


def layer(x: Tensor, weight: Tensor) -> Tensor:
    x, residual = ops.add_rms_norm(x, x, weight, 1e-6)
    x = ops.swiglu(ops.add_rms_norm(x, residual, weight, 1e-3)[0])
    return ops.rms_norm(x.view(x.shape[0], 2, DIM // 4), weight[: DIM // 4], 1e-6).flatten(1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: ops.rms_norm(x.view(x.shape[0] * 2, -1), weight[: DIM // 2], 1e-6),
        lambda x, weight: ops.rms_norm(x, weight, 1e-6 * x.shape[0]),
        lambda x, weight: ops.rms_norm(x[x.shape[0] // 2 :], weight, 1e-6),
        lambda x, weight: ops.rms_norm(x, weight, 1e-6) if x.shape[0] < TOKENS - 1 else ops.swiglu(x),
        lambda x, weight: [ops.rms_norm(x, weight, 1e-6) for _ in range(1 + (x.shape[0] < 9))],
    ],
    ids=[
        "twice the rows",
        "a number of the rows",
        "another place",
        "another kernel",
        "more calls",
    ],
)
def test_what_depends_on_the_rows_in_another_way_is_refused(function: Callable) -> None:
    x, weight = torch.randn(TOKENS, DIM), torch.rand(DIM)
    with pytest.raises(NotRecordableError, match="rows"):
        record(lambda rows: function(x[:rows], weight), TOKENS, CPU_IMPLEMENTATIONS, Arena())


def test_a_view_keeps_the_memory() -> None:
    x, weight = torch.randn(TOKENS, DIM), torch.rand(DIM)

    def two(_: int) -> tuple[Tensor, Tensor]:
        first = ops.rms_norm(x, weight, 1e-6).view(-1, 2)[3:]
        return first, ops.rms_norm(x, weight, 1e-3)

    (first, second), program = record(two, TOKENS, CPU_IMPLEMENTATIONS, Arena())
    program.run()
    assert torch.equal(first, ops.rms_norm(x, weight, 1e-6).view(-1, 2)[3:])
    assert torch.equal(second, ops.rms_norm(x, weight, 1e-3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: ops.rms_norm(x, torch.ones(DIM), 1e-6),
        lambda x: ops.rms_norm(x.t().contiguous().view(TOKENS, DIM), x[0], 1e-6),
        lambda x: ops.rotary(x.view(TOKENS, 1, DIM), x.view(TOKENS, 1, DIM), x, x),
    ],
    ids=["torch's own", "a new tensor of numbers", "a copy", "an operator without a kernel"],
)
def test_what_would_run_only_once_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(TOKENS, DIM)
    with pytest.raises(NotRecordableError, match="no kernel that can be recorded"):
        record(lambda _: function(x), TOKENS, CPU_IMPLEMENTATIONS, Arena())
    assert torch.equal(ops.rms_norm(x, x[0], 1e-6), ops.rms_norm(x.clone(), x[0].clone(), 1e-6))
