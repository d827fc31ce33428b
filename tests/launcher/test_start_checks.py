"""What is checked before the server is started."""

from __future__ import annotations

import socket

import pytest

from fastserve.launcher.start_checks import (
    Ports,
    check_ports,
    check_shared_memory,
    free_ports,
    resolve,
)
from fastserve.start_error import StartError

HOST = "127.0.0.1"


def test_free_ports_are_three_and_pass_the_check() -> None:
    ports = free_ports()
    assert len({ports.http, ports.grpc, ports.metrics}) == 3
    check_ports(HOST, ports)


@pytest.mark.parametrize("which", ["http", "grpc", "metrics", "openai"])
def test_a_port_in_use_is_named_by_its_flag(which: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        numbers = vars(free_ports()) | {which: taken.getsockname()[1]}
        with pytest.raises(
            StartError, match=f"Address already in use; give another port with --{which}-port"
        ):
            check_ports(HOST, Ports(**numbers))


def test_a_port_given_twice_is_refused() -> None:
    ports = free_ports()
    with pytest.raises(StartError, match="--grpc-port and --http-port are both"):
        check_ports(HOST, Ports(ports.http, ports.http, ports.metrics))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(StartError, match=r"cannot listen on 192\.0\.2\.1"):
        check_ports("192.0.2.1", free_ports())


def test_shared_memory_says_how_much_is_needed() -> None:
    check_shared_memory(0)
    with pytest.raises(StartError, match=f"needs {1 << 30} MiB there.*--shm-size"):
        check_shared_memory(1 << 50)


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("0.0.0.0", "0.0.0.0")]
)
def test_a_host_becomes_an_address(host: str, address: str) -> None:
    assert resolve(host) == address


def test_a_host_without_an_address_is_refused() -> None:
    with pytest.raises(StartError, match=r"no address for nowhere\.invalid.*--host"):
        resolve("nowhere.invalid")
