"""Tensors from one stage to the next."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
import torch

from fastserve.engine.stage_link import SLOT_BYTES, StageLink, make_link_memory
from fastserve_kernels.process_group import RankLostError

SLOTS = 3


@pytest.fixture
def link() -> Iterator[tuple[StageLink, StageLink]]:
    """The sender's end and the receiver's."""
    memory, ends = make_link_memory(SLOTS), socket.socketpair()
    yield StageLink(memory, ends[0], SLOTS), StageLink(memory, ends[1], SLOTS)
    os.close(memory)
    for end in ends:
        end.close()


def test_messages_come_in_order_and_whole(link: tuple[StageLink, StageLink]) -> None:
    """More than there are places, so that the sender waits for one that is free."""
    sender, receiver = link
    messages = [
        [torch.arange(number), torch.randn(number, 7), torch.randn(3, number + 1).bfloat16()]
        for number in range(1, 40)
    ]

    def send_all() -> None:
        for message in messages:
            sender.send(*message)

    thread = threading.Thread(target=send_all)
    thread.start()
    for message in messages:
        came = receiver.receive()
        assert [each.dtype for each in came] == [each.dtype for each in message]
        assert all(torch.equal(one, other) for one, other in zip(came, message, strict=True))
    thread.join()


def test_what_came_stays_when_its_place_is_written_again(link: tuple[StageLink, StageLink]) -> None:
    sender, receiver = link
    sender.send(torch.tensor([0]))
    (first,) = receiver.receive()
    for number in range(1, 2 * SLOTS):
        sender.send(torch.tensor([number]))
        receiver.receive()
    assert first.item() == 0


def test_nobody_waits_for_who_is_gone(link: tuple[StageLink, StageLink]) -> None:
    sender, receiver = link
    errors: list[Exception] = []

    def receive() -> None:
        try:
            receiver.receive()
        except RankLostError as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    sender.abort()
    thread.join(timeout=10)
    assert len(errors) == 1
    with pytest.raises(RankLostError, match="another stage has ended"):
        sender.send(torch.zeros(1))


def test_more_than_a_place_holds_is_refused(link: tuple[StageLink, StageLink]) -> None:
    too_large = torch.empty(1, dtype=torch.uint8).expand(SLOT_BYTES)
    with pytest.raises(ValueError, match=rf"a step of {SLOT_BYTES} bytes; allowed: "):
        link[0].send(too_large)
