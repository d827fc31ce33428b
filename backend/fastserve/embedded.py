"""The engine inside a Python program, without Triton server.

text = Model.load("path").predict("The capital of France is", max_tokens=20, temperature=0)

with ModelServer(model) as server:
    task = server.submit("Once upon a time", priority=5, max_tokens=100)
    for text in task:
        print(text, end="")
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from fastserve.checkpoints.model_files import locate
from fastserve.checkpoints.model_metadata import model_vocab_size
from fastserve.config import Config, ConfigError, check_ranks
from fastserve.engine.engine import Engine
from fastserve.engine.engine_loader import load_engine
from fastserve.engine.worker import run_engine
from fastserve.engine.worker_pipe import ToWorker
from fastserve.errors import ErrorCode, RequestError
from fastserve.text.input_processor import InputProcessor
from fastserve.text.output_processor import OutputProcessor, Response
from fastserve.text.sampling_options import SamplingOptions
from fastserve.text.tokenizer import Tokenizer, load_tokenizer
from fastserve.types import Add, Cancel, Outcome, Request, RequestOutput, SequenceOutput, Shutdown, StepOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
"""A chat: `{"role": ..., "content": ...}` each."""


class Model:
    """A loaded model with its tokenizer and KV cache. Threads and servers may share it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, input_processor: InputProcessor) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.input_processor = input_processor
        self._lock = threading.Lock()
        self._engine_thread: EngineThread | None = None
        """It steps the engine for all servers that are running."""

    def _acquire_thread(self) -> EngineThread:
        """For a server that starts; it gives the thread back by `_release_thread`."""
        with self._lock:
            thread = self._engine_thread
            if thread is None or thread.error is not None:
                if thread is not None:
                    thread.join()
                thread = self._engine_thread = EngineThread(self.engine)
            thread.num_servers += 1
            return thread

    def _release_thread(self, thread: EngineThread) -> None:
        with self._lock:
            thread.num_servers -= 1
            if thread.num_servers > 0:
                return
            thread.send(Shutdown())
            thread.join()
            if self._engine_thread is thread:
                self._engine_thread = None

    @classmethod
    def load(cls, path: str = "", **settings: Any) -> Model:
        """Loads a Hugging Face directory, a GGUF file or a hub name; nothing: the default model.

        `settings` are the fields of `fastserve.config.Config`. Raises ModelError, and ConfigError for more
        ranks than cores, and for what only a server has: tenant quotas, keys, the request log, and more
        replicas than one.
        """
        config = Config(model=path, **settings)
        for name in ("tenant_quotas", "keys_file", "request_log"):
            if getattr(config, name):
                raise ConfigError(f"`{name}`: got some; allowed: none without the server, whose it is")
        if config.replicas != 1:
            raise ConfigError(f"replicas: got {config.replicas}; allowed: 1 without Triton server")
        check_ranks(config)
        files = locate(config.model)
        engine = load_engine(config, files)
        tokenizer = load_tokenizer(files)
        size = model_vocab_size(files.checkpoint)
        return cls(engine, tokenizer, InputProcessor(config, tokenizer, engine.max_model_len, size))

    @overload
    def predict(self, prompt: str | Messages, **sampling: Unpack[SamplingOptions]) -> str: ...
    @overload
    def predict(self, prompt: list[str], **sampling: Unpack[SamplingOptions]) -> list[str]: ...

    def predict(
        self, prompt: str | Messages | list[str], **sampling: Unpack[SamplingOptions]
    ) -> str | list[str]:
        """The continuation of a text, or of each text of a list, all batched; or the answer to a chat.

            model.predict("One, two,", max_tokens=8, temperature=0.0)
            model.predict(["Red is", "Blue is"], max_tokens=8, stop=["."])
            model.predict([{"role": "user", "content": "Hello!"}], max_tokens=100, top_p=0.9, seed=1)

        Raises RequestError, which names the parameter, for one that is not valid.
        """
        is_list = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str)
        prompts: list[Any] = prompt if is_list else [prompt]  # type: ignore[assignment]
        with ModelServer(self) as server:
            tasks = [server.submit(each, **sampling) for each in prompts]
            texts = [task.result() for task in tasks]
        return texts if is_list else texts[0]


class Task:
    """A request that is being served. Iterating gives its text as it comes, `result` waits for the whole.

    Whether somebody iterates or not, it is served to its end. Any number of threads may wait for it.
    """

    def __init__(
        self, request: Request, output_processor: OutputProcessor, send: Callable[[ToWorker], None]
    ) -> None:
        self.request = request
        self._output_processor = output_processor
        self._send = send
        self._changed = threading.Condition()
        self._responses: list[Response] = []
        self._error: Exception | None = None
        self._is_done = False

    def _push(self, output: RequestOutput) -> None:
        """From the engine's thread: takes in what a step brought, and stops what has met a stop string."""
        if self._error is not None:
            return
        try:
            response = self._output_processor.push(output)
        except Exception as error:
            if not output.final:
                self._send(Cancel(self.request.uid, Outcome.CANCELLED))
            self._fail(error)
            return
        for index in self._output_processor.newly_stopped:
            self._send(Cancel(self.request.uid, Outcome.STOP, index))
        with self._changed:
            if response is not None:
                self._responses.append(response)
            self._is_done = output.final
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if not self._has_ended:
                self._error = error
                self._changed.notify_all()

    def responses(self, timeout: float | None = None) -> Iterator[Response]:
        """What comes, with everything that the request asked to be told; from the beginning on each call.

        Raises RequestError when the request fails, TimeoutError when `timeout` seconds pass without an end.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        seen, has_ended = 0, False
        while not has_ended:
            news, has_ended = self._wait(seen, give_up)
            yield from news
            seen += len(news)
        if self._error is not None:
            raise self._error

    def _wait(self, seen: int, give_up: float | None) -> tuple[list[Response], bool]:
        """The responses after the first `seen`, and whether no more will come; waits for either."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: len(self._responses) > seen or self._has_ended,
                None if give_up is None else max(0.0, give_up - time.monotonic()),
            )
            if not came:
                raise TimeoutError(f"request {self.request.uid} has not ended in time")
            return self._responses[seen:], self._has_ended

    @property
    def _has_ended(self) -> bool:
        return self._is_done or self._error is not None

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
        self._send(Cancel(self.request.uid, Outcome.CANCELLED))


class EngineThread:
    """Steps an engine and hands what comes to its tasks; those that are left when it ends fail."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[ToWorker | Exception] = queue.SimpleQueue()
        self.send = self._inbox.put
        engine.on_loss(self._inbox.put)
        self._lock = threading.Lock()
        self._tasks: dict[str, _InFlight] = {}
        self.error: BaseException | None = None
        """Why it has ended; None: it has not."""
        self.num_servers = 0
        """Servers of the model that use it."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self.join = self._thread.join

    def submit(self, task: Task, server: ModelServer) -> None:
        """Raises RequestError if the thread has ended."""
        with self._lock:
            if self.error is not None:
                raise _ended(self.error)
            self._tasks[task.request.uid] = _InFlight(task, server, task.request.sampling.n)
            self.send(Add(task.request))

    def fail_tasks_of(self, server: ModelServer, error: RequestError) -> None:
        """Ends what that server has in flight."""
        with self._lock:
            uids = [uid for uid, each in self._tasks.items() if each.server is server]
            tasks = [self._tasks.pop(uid).task for uid in uids]
        for task in tasks:
            task.cancel()
            task._fail(error)

    def _run(self) -> None:
        error: BaseException = RequestError("the server was stopped", ErrorCode.CANCELLED)
        try:
            run_engine(self._engine, self._inbox, self._deliver)
        except BaseException as failure:  # whatever it is, nobody may wait for ever
            logger.exception("the engine has failed")
            error = failure
        with self._lock:
            self.error = error
            left, self._tasks = self._tasks, {}
        for each in left.values():
            each.task._fail(_ended(error))
        for uid in left:
            try:
                self._engine.cancel(uid, Outcome.CANCELLED)
            except Exception:
                logger.exception("request %s could not be taken out of the engine", uid)

    def _deliver(self, step: StepOutput) -> None:
        by_request: dict[str, list[SequenceOutput]] = {}
        for output in step.outputs:
            by_request.setdefault(output.uid, []).append(output)
        for uid, outputs in by_request.items():
            with self._lock:
                in_flight = self._tasks.get(uid)
                if in_flight is None:
                    continue
                in_flight.sequences_left -= sum(output.outcome is not None for output in outputs)
                final = in_flight.sequences_left == 0
                if final:
                    del self._tasks[uid]
            in_flight.task._push(RequestOutput(uid, outputs, in_flight.task.request, final))


@dataclass(slots=True)
class _InFlight:
    task: Task
    server: ModelServer
    sequences_left: int


def _ended(error: BaseException) -> RequestError:
    """What a task is told of the end of the engine's thread; each raises an error of its own."""
    if isinstance(error, RequestError):
        return RequestError(str(error), error.code)
    failure = RequestError(f"the engine has failed: {type(error).__name__}: {error}", ErrorCode.INTERNAL)
    failure.__cause__ = error
    return failure


class ModelServer:
    """Serves a model to the threads of this program: continuous batching, priorities, streaming.

    Several servers may run over one model: they share its batch, and each stops its own requests alone.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._thread: EngineThread | None = None

    def start(self) -> ModelServer:
        """Raises RuntimeError if it is running already."""
        with self._lock:
            if self._thread is not None:
                raise RuntimeError("the server is running already")
            self._thread = self._model._acquire_thread()
        return self

    def submit(
        self,
        prompt: str | Messages | list[int],
        *,
        priority: int = 0,
        tenant: str = "",
        expected_output_tokens: int | None = None,
        timeout: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Task:
        """Takes a request: a text, a chat or token ids.

            task = server.submit("Once upon a time", priority=5, timeout=30, max_tokens=100, top_p=0.9)

        `timeout` in seconds bounds the whole request; `expected_output_tokens`, at most `max_tokens`, is a
        hint for the policy. Raises RequestError if the request is not valid, and (INTERNAL) if the engine has
        failed; RuntimeError if the server is not running.
        """
        thread = self._thread
        if thread is None:
            raise RuntimeError("the server is not running: call start() first")
        inputs = {
            _prompt_field(prompt): prompt,
            "sampling_parameters": sampling,
            "stream": True,
            "priority": priority,
            "tenant": tenant,
            "expected_output_tokens": expected_output_tokens,
        }
        processor, timeout_us = self._model.input_processor, int((timeout or 0) * 1e6)
        request = processor.check_guide(
            processor.parse(inputs, {}, now=time.monotonic(), timeout_us=timeout_us)
        )
        task = Task(request, OutputProcessor(self._model.tokenizer, request), thread.send)
        with self._lock:
            if self._thread is not thread:
                raise RuntimeError("the server is not running: it was stopped meanwhile")
            thread.submit(task, self)
        return task

    def stop(self) -> None:
        """Requests of this server that are in flight fail with CANCELLED; others of the model go on."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.fail_tasks_of(self, RequestError("the server was stopped", ErrorCode.CANCELLED))
            self._model._release_thread(thread)

    def __enter__(self) -> ModelServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _prompt_field(prompt: str | Messages | list[int]) -> str:
    if isinstance(prompt, str):
        return "text_input"
    return "messages" if prompt and isinstance(prompt[0], dict) else "prompt_token_ids"
