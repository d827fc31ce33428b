"""gevent's greenlets share a client, as the load tests' users do, in a process that gevent patches."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.client.conftest import FakeServer

PROGRAM = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent
import grpc.experimental.gevent
grpc.experimental.gevent.init_gevent()
from fastserve_client import Client

url, protocol = sys.argv[1:]
with Client(url, protocol) as client:
    hanging = client.stream("hang")
    assert next(hanging).text == "x"
    reader = gevent.spawn(list, hanging)
    users = [gevent.spawn(lambda: client.stream("p", timeout=60).read().text) for _ in range(6)]
    gevent.joinall(users, timeout=30, raise_error=True)
    assert [user.value for user in users] == ["xy"] * 6, users
    assert not reader.ready()  # it let the others run, and still reads
    hanging.close()
    reader.join(10)
    assert reader.value == [], reader
"""


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_greenlets_share_a_client(server: FakeServer, protocol: str) -> None:
    pytest.importorskip("gevent")
    server.script = [
        [server.token("x"), server.hang()],
        [server.token("x"), server.token("y", "stop")],
    ]
    command = [sys.executable, "-c", PROGRAM, server.urls[protocol], protocol]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert server.client_gone.wait(5)
