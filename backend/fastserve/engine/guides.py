"""Guided decoding: which tokens a JSON schema, a regex, a choice or a grammar allows next (by llguidance)."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fastserve.errors import ErrorCode, RequestError
from fastserve.text.guide import grammar_of
from fastserve.types import Guide

logger = logging.getLogger(__name__)

MAX_COMPILE_SECONDS = 10.0
"""Processor time, so that a slow machine refuses no more than a fast one."""
MAX_CACHE_BYTES = 256 << 20
"""For the compiled guides that are kept for later requests."""
BYTES_PER_CHARACTER = 128
"""What a compiled grammar takes for each character of its source: 30 to 91 were measured."""
BYTES_PER_GUIDE = 64 << 10
MAX_LEXER_STATES = 20_000
"""Each takes 1 to 2 kB; they are made while a guide is followed, and shared by all that follow it."""


class GuideMatcher:
    """The state that one sequence has reached in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        """`vocab_size`: the compiler's, which may be larger than the model's."""
        self._matcher = matcher
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)

    def mask(self, logits: torch.Tensor) -> RequestError | None:
        """Sets the logits [vocab] of tokens that the grammar does not allow next to minus infinity."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            return self._error(
                "nothing that the tokenizer has can follow what was generated, or the guide is too complex "
                "there",
                ErrorCode.INVALID_ARG,
            )
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        allowed = torch.zeros(logits.shape[0], dtype=torch.bool)
        known = min(len(bits), logits.shape[0])
        allowed[:known] = torch.from_numpy(bits[:known].view(np.bool_))
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)
        return None

    def accept(self, token_id: int) -> RequestError | None:
        """Moves on by a token that `mask` allowed."""
        if self._matcher.consume_token(token_id):
            return None
        return self._error(f"the guide did not take token {token_id}, which it allowed", ErrorCode.INTERNAL)

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def _error(self, sentence: str, code: ErrorCode) -> RequestError:
        logger.info("a guide ended early: %s: %s", sentence, self._matcher.get_error())
        return RequestError(f"`structured_outputs`: {sentence}", code)


class CompiledGuide:
    """A guide that can be followed any number of times."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, num_bytes: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.num_bytes = num_bytes
        """An estimate of its memory."""

    def matcher(self) -> GuideMatcher:
        """A matcher at the beginning."""
        return GuideMatcher(self._matcher.deep_copy(), self._vocab_size)


class GuideCache:
    """Compiled guides by grammar, the least recently used dropped first. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._guides: OrderedDict[str, CompiledGuide] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, grammar: str) -> CompiledGuide | None:
        """The guide of that grammar; None if it is not kept."""
        with self._lock:
            guide = self._guides.get(grammar)
            if guide is not None:
                self._guides.move_to_end(grammar)
            return guide

    def put(self, grammar: str, guide: CompiledGuide) -> None:
        """Keeps a guide, unless it alone is larger than the cache."""
        with self._lock:
            if grammar in self._guides or guide.num_bytes > self._max_bytes:
                return
            self._guides[grammar] = guide
            self.num_bytes += guide.num_bytes
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= self._guides.popitem(last=False)[1].num_bytes


class GuideCompiler:
    """Compiles guides over one tokenizer, which is prepared when the first guided request comes.

    Either can take a second, so a thread of its own does it while the engine's steps go on.
    """

    def __init__(self, tokenizer_directory: Path, eos_token_ids: list[int], vocab_size: int) -> None:
        """`vocab_size`: the model's."""
        self._directory = tokenizer_directory
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        self._tokenizer: LLTokenizer | None = None
        self._cache = GuideCache(MAX_CACHE_BYTES)
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: _CompilerThread | None = None

    def compile(self, guide: Guide) -> Future[CompiledGuide]:
        """The compiled guide, or RequestError if it does not compile."""
        if self._thread is None:
            self._thread = _CompilerThread(self, self._jobs)
        job = _Job(guide)
        self._jobs.put(job)
        return job.future

    def abandon_heavy(self) -> None:
        """Refuses the guide that is being compiled if it has taken too much time, and goes on with others.

        The compiler cannot be interrupted: its thread ends when it is done with that guide.
        """
        if self._thread is not None and self._thread.abandon_if_longer(MAX_COMPILE_SECONDS):
            self._thread = _CompilerThread(self, self._jobs)

    def _compile(self, guide: Guide) -> CompiledGuide:
        """Compiles a guide, in the thread. Raises RequestError."""
        try:
            grammar = grammar_of(guide)
        except ValueError as error:
            raise RequestError(f"`structured_outputs`: it does not compile: {error}") from error
        found = self._cache.get(grammar)
        if found is not None:
            return found
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            message = matcher.get_error().split("\n<", 1)[0]  # after which comes the compiler's inner state
            raise RequestError(f"`structured_outputs`: it does not compile: {message}")
        num_bytes = BYTES_PER_GUIDE + BYTES_PER_CHARACTER * len(grammar)
        compiled = CompiledGuide(matcher, self._tokenizer.vocab_size, num_bytes)
        self._cache.put(grammar, compiled)
        return compiled

    def _load_tokenizer(self) -> LLTokenizer:
        """Over the model's ids, or the tokenizer's where it has more: masks are cut to the model's."""
        definition = (self._directory / "tokenizer.json").read_text(encoding="utf-8")
        eos = [token_id for token_id in self._eos_token_ids if token_id < self._vocab_size] or None
        try:
            return LLTokenizer(definition, n_vocab=self._vocab_size, eos_token=eos)
        except ValueError:  # what llguidance says of a tokenizer of more tokens than n_vocab
            return LLTokenizer(definition, eos_token=eos)


class _Job:
    """A guide to compile."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.future: Future[CompiledGuide] = Future()


class _CompilerThread:
    """Compiles one guide after another; a guide that it is too long at can be taken from it."""

    def __init__(self, compiler: GuideCompiler, jobs: queue.SimpleQueue[_Job]) -> None:
        self._compiler = compiler
        self._jobs = jobs
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._job: _Job | None = None
        self._began = 0.0
        """The thread's processor time when it took the job."""
        self._thread = threading.Thread(target=self._run, name="guides", daemon=True)
        self._thread.start()

    def abandon_if_longer(self, seconds: float) -> bool:
        """Whether its guide has taken more than `seconds`: then that is refused, and it takes no other."""
        with self._lock:
            if self._job is None or self._is_abandoned:
                return False
            assert self._thread.ident is not None
            clock = time.pthread_getcpuclockid(self._thread.ident)
            if time.clock_gettime(clock) - self._began <= seconds:
                return False
            self._is_abandoned = True
            self._job.future.set_exception(
                RequestError(
                    "`structured_outputs`: it is too complex: compiling it takes more than "
                    f"{seconds:g} s of processor time"
                )
            )
            return True

    def _run(self) -> None:
        while not self._is_abandoned:
            job = self._jobs.get()
            with self._lock:
                self._job, self._began = job, time.thread_time()
            result: CompiledGuide | Exception
            try:
                result = self._compiler._compile(job.guide)
            except RequestError as error:
                result = error
            except Exception as error:
                logger.exception("a guide could not be compiled")
                result = RequestError(
                    f"`structured_outputs`: it could not be compiled: {type(error).__name__}: {error}",
                    ErrorCode.INTERNAL,
                )
            with self._lock:
                self._job = None
                if self._is_abandoned:
                    return
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)
