"""A stub whose server dies, while all its threads wait for that server."""

from __future__ import annotations

import os
import subprocess
import sys

STUB = """
import os, threading
from fastserve.ensemble import server_death
server_death.LOOK_SECONDS = server_death.GRACE_SECONDS = 0.05
server_death.leave_with_server()
print(os.getpid(), flush=True)
threading.Event().wait()
"""
SERVER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); sys.stdin.read()"


def test_a_stub_whose_threads_all_wait_ends_with_its_server() -> None:
    command = [sys.executable, "-c", SERVER, STUB]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        stub = int(server.stdout.readline())
        os.kill(stub, 0)
        server.kill()
        assert server.stdout.read() == b""  # the stub's end has closed it
