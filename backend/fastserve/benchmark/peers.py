"""Other engines as targets of a benchmark: servers of OpenAI's API, and commands that wrap a library."""

from __future__ import annotations

import http.client
import json
import queue
import shlex
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from fastserve.benchmark.job import Job
from fastserve.benchmark.targets import Target

REQUEST_SECONDS = 600.0
"""That a peer may be silent."""
CLOSE_SECONDS = 10.0


class PeerError(Exception):
    """A peer could not be reached or started, or did not answer as it should."""


def open_peer(address: str) -> Target:
    """A peer by its address: a server's URL (`http://HOST:PORT`), or else a command (see `AdapterTarget`).

    Raises PeerError.
    """
    return OpenAITarget(address) if address.startswith("http://") else AdapterTarget(address)


class OpenAITarget:
    """A server with OpenAI's `/v1/completions`; the first model that it lists."""

    def __init__(self, url: str) -> None:
        """Raises PeerError if no server answers there."""
        self._url = url
        self._address = urlsplit(url).netloc
        listed = json.loads(self._ask("GET", "/v1/models", None).read())
        self._model = listed["data"][0]["id"]

    def stream(self, job: Job) -> Iterator[int]:
        """Yields how many tokens each chunk brought: one each, the last as many as the server's count lacks.

        Raises PeerError.
        """
        body = {
            "model": self._model,
            "prompt": job.prompt_token_ids,
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,  # no part of OpenAI's API, but vLLM's and llama.cpp's
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        num_tokens = 0
        for event in self._events(self._ask("POST", "/v1/completions", body)):
            if event.get("choices"):
                yield 1
                num_tokens += 1
            if event.get("usage"):
                missing = int(event["usage"]["completion_tokens"]) - num_tokens
                if missing:
                    yield missing
                num_tokens += missing
        if num_tokens != job.max_tokens:
            raise PeerError(f"{self._url} answered with {num_tokens} tokens in place of {job.max_tokens}")

    def close(self) -> None:
        """Does nothing: a connection ends with its request."""

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self._address, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise PeerError(f"{self._url}: {error}") from error
        if response.status != 200:
            raise PeerError(f"{self._url}{path}: {response.status}: {response.read()[:500]!r}")
        return response

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The JSON of server-sent events."""
        try:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield json.loads(data)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise PeerError(f"{self._url}: {error}") from error


class AdapterTarget:
    """A library behind a command, which reads requests from its input and tells of tokens on its output.

    Each line is a JSON object. The command writes `{"ready": true}` when it can serve, then reads
    `{"id", "prompt_token_ids", "max_tokens"}` at any time, and writes `{"id", "num_tokens", "done"}` whenever
    tokens have come, or `{"id", "error"}`. It ends when its input does. `examples/peers/` has some.
    """

    def __init__(self, command: str) -> None:
        """Raises PeerError if the command ends before it is ready."""
        self._command = command
        try:
            self._process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except (OSError, ValueError) as error:
            raise PeerError(f"{command}: {error}") from error
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """Apart from the other: the pipe may be full until the reader has read, which needs that one."""
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        """Of the requests in flight, by id."""
        self._num_requests = 0
        if not self._is_ready():
            raise PeerError(f"{command}: ended with {self._process.wait()} before it was ready")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def stream(self, job: Job) -> Iterator[int]:
        """Yields how many tokens each line brought. Raises PeerError."""
        answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        with self._lock:
            self._num_requests += 1
            number = self._num_requests
            self._answers[number] = answers
        request = {"id": number, "prompt_token_ids": job.prompt_token_ids, "max_tokens": job.max_tokens}
        try:
            self._write(request)
            yield from self._tokens(answers)
        finally:
            with self._lock:
                del self._answers[number]

    def close(self) -> None:
        """Ends the command."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has ended already, and what was written for it is lost
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        return any(answer.get("ready") for answer in self._lines())

    def _lines(self) -> Iterator[dict[str, Any]]:
        """What the command says; lines that are no JSON are some library's own words."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                yield json.loads(line)

    def _write(self, request: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            with self._writing:
                self._process.stdin.write(json.dumps(request) + "\n")
        except OSError as error:
            raise PeerError(f"{self._command}: {error}") from error

    def _read(self) -> None:
        ending = "the command has ended"
        try:
            for answer in self._lines():
                with self._lock:
                    answers = self._answers.get(answer["id"])
                if answers is not None:
                    answers.put(answer)
        except (ValueError, KeyError) as error:
            ending = f"the command wrote what is no answer: {error!r}"
        with self._lock:
            for answers in self._answers.values():
                answers.put({"error": ending})

    def _tokens(self, answers: queue.SimpleQueue[dict[str, Any]]) -> Iterator[int]:
        while True:
            try:
                answer = answers.get(timeout=REQUEST_SECONDS)
            except queue.Empty as error:
                raise PeerError(f"{self._command}: silent for {REQUEST_SECONDS:g} s") from error
            if "error" in answer:
                raise PeerError(f"{self._command}: {answer['error']}")
            if answer["num_tokens"]:
                yield answer["num_tokens"]
            if answer.get("done"):
                return
