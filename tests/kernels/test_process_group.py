"""Ranks, here threads of one process, say the same to one another through memory and through gloo."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rank_threads import gloo, on_each, shared_memory
from torch import Tensor

from fastserve_kernels.cpu.kernels.all_reduce import SLOT_BYTES
from fastserve_kernels.cpu.recording import Arena, record
from fastserve_kernels.operator_definition import CPU_IMPLEMENTATIONS
from fastserve_kernels.process_group import ProcessGroup, RankLostError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sum_of(parts: list[Tensor], group: ProcessGroup) -> Tensor:
    return group.all_reduce(parts[group.rank])


def in_order(parts: list[Tensor]) -> Tensor:
    """The float32 sum, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@pytest.mark.parametrize("make_groups", [shared_memory, gloo])
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_get_the_sum_in_the_order_of_ranks(make_groups: Any, world_size: int) -> None:
    """Of more rows, and of fewer, than the time before; a row's bits do not depend on the others."""
    groups = make_groups(world_size)
    for number, (rows, width) in enumerate([(1, 576), (16, 576), (300, 50), (5, 5000), (2, 7), (40, 576)]):
        parts = [torch.randn(rows, width).to(DTYPES[number % 3]) for _ in groups]
        expected = in_order(parts)
        for total in on_each(groups, partial(sum_of, parts)):
            assert torch.equal(total, expected)
        alone = on_each(groups, partial(sum_of, [part[-1:] for part in parts]))
        assert torch.equal(alone[0][0], expected[-1])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 60), st.sampled_from([1, 16, 17, 1000])), min_size=1, max_size=6))
def test_calls_follow_one_another_without_a_pause(shapes: list[tuple[int, int]]) -> None:
    """A rank that is quick must not write over what another still reads."""
    parts = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    found = on_each(shared_memory(3), lambda group: [group.all_reduce(x) for x in parts[group.rank]])
    expected = [in_order(list(each)) for each in zip(*parts, strict=True)]
    for totals in found:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(totals, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_recording_has_it_as_one_kernel_of_any_number_of_rows(threads: int) -> None:
    groups, count = shared_memory(2), 70

    def compute(group: ProcessGroup) -> list[Tensor]:
        torch.set_num_threads(threads)
        static = torch.full((count, 96), float(group.rank + 1))
        total, program = record(
            lambda rows: group.all_reduce(group.all_reduce(static[:rows])),
            count,
            CPU_IMPLEMENTATIONS,
            Arena(),
        )
        found = []
        for rows in (count, 3, 64):
            program.resize(rows)
            program.run()
            found.append(total[:rows].clone())
        return found

    for found in on_each(groups, compute):
        assert [each.unique().tolist() for each in found] == [[6.0]] * 3


@pytest.mark.parametrize("make_groups", [shared_memory, gloo])
def test_gather_and_broadcast(make_groups: Any) -> None:
    sent = torch.arange(24, dtype=torch.float16).view(2, 3, 4)

    def compute(group: ProcessGroup) -> tuple[Tensor, Tensor]:
        gathered = group.gather(torch.full((2, group.rank + 1), float(group.rank)), [1, 2, 3])
        return gathered, group.broadcast(sent if group.rank == 0 else None)

    results = on_each(make_groups(3), compute)
    assert results[0][0].tolist() == [[0.0, 1.0, 1.0, 2.0, 2.0, 2.0]] * 2
    assert results[1][0].tolist() == [[1.0, 1.0]] * 2
    assert all(torch.equal(received, sent) for _, received in results)


def test_a_sleeper_is_woken_when_a_rank_is_gone() -> None:
    groups, was_lost = shared_memory(2), threading.Event()

    def wait_for_ever() -> None:
        with pytest.raises(RankLostError):
            groups[0].all_reduce(torch.ones(1, 8))
        was_lost.set()

    thread = threading.Thread(target=wait_for_ever)
    thread.start()
    groups[1].abort()
    thread.join(timeout=30)
    assert was_lost.is_set()
    with pytest.raises(RankLostError):
        groups[1].broadcast(None)


def test_what_no_slot_holds_is_refused() -> None:
    (group,) = shared_memory(1)
    with pytest.raises(ValueError, match=rf"allowed: {SLOT_BYTES - 64}"):
        group.broadcast(torch.empty(SLOT_BYTES, dtype=torch.int64))
