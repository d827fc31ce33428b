"""What is checked before the server is started."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from fastserve.config import Config
from fastserve.launcher.access_checks import check_access
from fastserve.launcher.command_line import ServerOptions
from fastserve.launcher.launcher import Server
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


def test_the_metrics_port_is_tried_at_its_own_address() -> None:
    ports = free_ports()
    with socket.create_server(("127.0.0.2", ports.metrics)):
        check_ports(HOST, ports)
        with pytest.raises(StartError, match=rf"cannot listen on 127\.0\.0\.2:{ports.metrics}"):
            check_ports(HOST, ports, "127.0.0.2")


def test_keys_that_cannot_be_read_are_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "echo").mkdir()
    (tmp_path / "echo" / "config.pbtxt").touch()
    config = Config(keys_file=str(tmp_path / "keys.json"))
    server = Server(config, ServerOptions(ports=free_ports(), model_repository=tmp_path))
    with pytest.raises(StartError, match=r"--keys-file: .*keys\.json: .*No such file.*`fastserve keys add`"):
        server.start()


def test_what_a_request_log_lacks_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartError, match=r"--request-log .*: Is a directory"):
        check_access(Config(request_log=str(tmp_path)))
    masked = Config(request_log=str(tmp_path / "log"), log_prompts="masked")
    check_access(masked)
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(StartError, match=r"--log-prompts masked: .*phonenumbers.*fastserve\[masking\]"):
        check_access(masked)


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
