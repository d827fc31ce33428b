"""The engine inside a Python program, without Triton server.

text = Model.load("path").predict("The capital of France is", max_tokens=20, temperature=0)

with ModelServer(model) as server:
    task = server.submit("Once upon a time", priority=5, max_tokens=100)
    for text in task:
        print(text, end="")
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, overload

from fastserve.config import Config
from fastserve.engine.engine import Engine
from fastserve.engine.loading import load_engine
from fastserve.engine.worker import ToWorker, run_engine
from fastserve.errors import ErrorCode, RequestError
from fastserve.model_files import load_tokenizer, locate
from fastserve.models.model_directory import vocab_size
from fastserve.text.postprocessor import Postprocessor, Response
from fastserve.text.preprocessor import Preprocessor
from fastserve.text.tokenizer import Tokenizer
from fastserve.types import Add, Cancel, Outcome, Request, RequestOutput, SequenceOutput, Shutdown, StepOutput

Messages = list[dict[str, Any]]
"""A chat: `{"role": ..., "content": ...}` each."""


class Model:
    """A loaded model with its tokeniser and KV cache."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, preprocessor: Preprocessor) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.preprocessor = preprocessor
        self._owner = threading.Lock()
        """Held by the `ModelServer` that steps the engine."""

    @classmethod
    def load(cls, path: str = "", **settings: Any) -> Model:
        """Loads a Hugging Face directory, a GGUF file or a hub name; nothing: the default model.

        `settings` are the fields of `fastserve.config.Config`. Raises ModelError.
        """
        config = Config(model=path, **settings)
        files = locate(config.model)
        engine = load_engine(config, files)
        tokenizer = load_tokenizer(files)
        size = vocab_size(files.checkpoint)
        return cls(engine, tokenizer, Preprocessor(config, tokenizer, engine.max_model_len, size))

    @overload
    def predict(self, prompt: str | Messages, **sampling: Any) -> str: ...
    @overload
    def predict(self, prompt: list[str], **sampling: Any) -> list[str]: ...

    def predict(self, prompt: str | Messages | list[str], **sampling: Any) -> str | list[str]:
        """The continuation of a text, or of each text of a list, all batched; or the answer to a chat.

        `sampling`: the fields of `SamplingParams`. Raises RequestError.
        """
        is_list = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str)
        prompts: list[Any] = prompt if is_list else [prompt]  # type: ignore[assignment]
        with ModelServer(self) as server:
            tasks = [server.submit(each, **sampling) for each in prompts]
            texts = [task.result() for task in tasks]
        return texts if is_list else texts[0]


class Task:
    """A request that is being served. Iterating gives its text as it comes, `result` waits for the whole."""

    def __init__(self, server: ModelServer, request: Request, postprocessor: Postprocessor) -> None:
        self.request = request
        self._server = server
        self._postprocessor = postprocessor
        self._outputs: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
        self._responses: list[Response] = []
        self._error: Exception | None = None
        self._done = False

    def deliver(self, output: RequestOutput | Exception) -> None:
        """From the engine's thread."""
        self._outputs.put(output)

    def responses(self, timeout: float | None = None) -> Iterator[Response]:
        """What comes, with everything that the request asked to be told; from the beginning on each call.

        Raises RequestError when the request fails, TimeoutError when `timeout` seconds pass without an end.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        seen = 0
        while True:
            while seen < len(self._responses):
                seen += 1
                yield self._responses[seen - 1]
            if self._error is not None:
                raise self._error
            if self._done:
                return
            self._wait(give_up)

    def _wait(self, give_up: float | None) -> None:
        try:
            output = self._outputs.get(
                timeout=None if give_up is None else max(0.0, give_up - time.monotonic())
            )
        except queue.Empty:
            raise TimeoutError(f"request {self.request.uid} has not ended in time") from None
        try:
            if isinstance(output, Exception):
                raise output
            response = self._postprocessor.push(output)
        except Exception as error:
            self._error = error
            return
        for index in self._postprocessor.newly_stopped:
            self._server.send(Cancel(self.request.uid, Outcome.STOP, index))
        if response is not None:
            self._responses.append(response)
        self._done = output.final

    def __iter__(self) -> Iterator[str]:
        """The text of the first sequence, piece by piece."""
        for response in self.responses():
            if response.text[0]:
                yield response.text[0]

    def result(self, timeout: float | None = None) -> str:
        """The whole text of the first sequence. Raises as `responses` does."""
        return "".join(response.text[0] for response in self.responses(timeout))

    def cancel(self) -> None:
        """Stops the request; unless it has ended, `result` and iteration raise RequestError (CANCELLED)."""
        self._server.send(Cancel(self.request.uid, Outcome.CANCELLED))


class _QueueInbox:
    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self.put = self._messages.put

    def receive(self, block: bool) -> ToWorker | None:
        try:
            return self._messages.get(block=block)
        except queue.Empty:
            return None


class ModelServer:
    """Serves a model to the threads of this program: continuous batching, priorities, streaming."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tasks: dict[str, tuple[Task, int]] = {}
        """With the number of sequences that have not ended."""
        self._lock = threading.Lock()
        self._inbox = _QueueInbox()
        self._thread: threading.Thread | None = None

    def start(self) -> ModelServer:
        """Raises RuntimeError if another server runs this model."""
        if not self._model._owner.acquire(blocking=False):
            raise RuntimeError("another ModelServer is running this model: use that one, or stop it first")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    def submit(
        self,
        prompt: str | Messages | list[int],
        *,
        priority: int = 0,
        tenant: str = "",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Task:
        """Takes a request: a text, a chat or token ids. Raises RequestError if it is not valid.

        `timeout` in seconds bounds the whole request. `sampling`: the fields of `SamplingParams`.
        """
        if self._thread is None:
            raise RuntimeError("the server is not running: call start() first")
        request = self._model.preprocessor.build(
            {
                _prompt_field(prompt): prompt,
                "sampling_parameters": sampling,
                "stream": True,
                "priority": priority,
                "tenant": tenant,
            },
            {},
            now=time.monotonic(),
            timeout_us=int((timeout or 0) * 1e6),
        )
        task = Task(self, request, Postprocessor(self._model.tokenizer))
        with self._lock:
            self._tasks[request.uid] = (task, request.sampling.n)
        self.send(Add(request))
        return task

    def send(self, message: ToWorker) -> None:
        self._inbox.put(message)

    def stop(self) -> None:
        """Ends the engine's thread; requests in flight fail with CANCELLED."""
        if self._thread is None:
            return
        self.send(Shutdown())
        self._thread.join()
        self._thread = None

    def _run(self) -> None:
        error: Exception = RequestError("the server was stopped", ErrorCode.CANCELLED)
        try:
            run_engine(self._model.engine, self._inbox, self._deliver)
        except Exception as failure:
            error = failure
        with self._lock:
            tasks, self._tasks = self._tasks, {}
        for uid, (task, _) in tasks.items():
            self._model.engine.cancel(uid, Outcome.CANCELLED)
            task.deliver(error)
        self._model._owner.release()

    def _deliver(self, step: StepOutput) -> None:
        by_request: dict[str, list[SequenceOutput]] = {}
        for output in step.outputs:
            by_request.setdefault(output.uid, []).append(output)
        with self._lock:
            for uid, outputs in by_request.items():
                if uid in self._tasks:
                    self._deliver_to(uid, outputs)

    def _deliver_to(self, uid: str, outputs: list[SequenceOutput]) -> None:
        task, left = self._tasks[uid]
        left -= sum(output.outcome is not None for output in outputs)
        if left:
            self._tasks[uid] = (task, left)
        else:
            del self._tasks[uid]
        task.deliver(RequestOutput(uid, outputs, task.request, final=left == 0))

    def __enter__(self) -> ModelServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _prompt_field(prompt: str | Messages | list[int]) -> str:
    if isinstance(prompt, str):
        return "text_input"
    return "messages" if prompt and isinstance(prompt[0], dict) else "prompt_token_ids"
