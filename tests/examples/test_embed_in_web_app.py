"""The web application, served by uvicorn on a free port."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from fastserve import Model, ModelServer
from fastserve.embedded import Task
from fastserve.errors import RequestError

SECONDS = 60.0


class RecordingServer(ModelServer):
    """It keeps the tasks that it was given."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.tasks: list[Task] = []

    def submit(self, *prompt: Any, **options: Any) -> Task:
        self.tasks.append(super().submit(*prompt, **options))
        return self.tasks[-1]


@pytest.fixture
def server(model: Model) -> Iterator[RecordingServer]:
    server = RecordingServer(model)
    with server:
        yield server


@pytest.fixture
def address(server: RecordingServer) -> Iterator[tuple[str, int]]:
    """Where the application listens: its socket does before it runs, so the first request need not wait."""
    import embed_in_web_app

    with socket.create_server(("127.0.0.1", 0)) as listener:
        web = uvicorn.Server(uvicorn.Config(embed_in_web_app.create_app(server), log_level="error"))
        thread = threading.Thread(target=web.run, args=([listener],))
        thread.start()
        yield listener.getsockname()
        web.should_exit = True
        thread.join()


def post(address: tuple[str, int], body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(*address, timeout=SECONDS)
    connection.request("POST", "/generate", json.dumps(body))
    return connection, connection.getresponse()


def test_text_comes_as_it_is_made(address: tuple[str, int]) -> None:
    connection, response = post(
        address, {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 20}
    )
    assert response.status == 200
    pieces = list(iter(lambda: response.read1(), b""))
    assert len(pieces) > 1
    assert "Paris" in b"".join(pieces).decode()
    connection.close()


def test_a_browser_that_goes_away_stops_its_request(
    address: tuple[str, int], server: RecordingServer
) -> None:
    endless = {"prompt": "Count up.", "max_tokens": 1900, "priority": 3}
    connection, response = post(address, endless)
    assert response.read1()
    connection.close()
    response.close()
    # Of lower priority, so that it has the only place when the other request is gone, and not before.
    behind = {"prompt": "One, two,", "temperature": 0, "max_tokens": 4, "priority": -3}
    connection, response = post(address, behind)
    assert response.read()
    connection.close()
    with pytest.raises(RequestError, match="cancel"):
        server.tasks[0].result(SECONDS)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([], "Expected `object`"),
        ({"max_tokens": 3}, "required field `prompt`"),
        ({"prompt": "a", "max_token": 3}, "unknown field `max_token`"),
        ({"prompt": "a", "max_tokens": "many"}, "$.max_tokens"),
        ({"prompt": "a", "temperature": -1}, "`temperature`: got -1"),
    ],
)
def test_a_body_that_cannot_be_is_refused_by_name(address: tuple[str, int], body: Any, reason: str) -> None:
    connection, response = post(address, body)
    assert response.status == 400
    assert reason in json.loads(response.read())["error"]
    connection.close()
