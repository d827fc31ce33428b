"""Trying guides out in processes that may die of it.

The compiler of llguidance 1.9 was seen to end its process over a guide, and to stay busy over one for hours;
no bound on the size of a guide tells which. So a guide is compiled in a process of its own first, with less
stack than others have and little time. What passes there, an engine may compile.

One child process holds the tokenizer and is forked for each guide, which takes milliseconds: guides are tried
out beside each other, and one that its process dies of costs the others nothing.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import weakref
from functools import lru_cache
from pathlib import Path
from threading import Lock, Timer
from typing import TYPE_CHECKING

import msgspec
from llguidance import LLMatcher, LLTokenizer

from fastserve.errors import ErrorCode, RequestError
from fastserve.text.guide import grammar_of
from fastserve.types import Guide

if TYPE_CHECKING:  # the child needs no transformers
    from fastserve.text.tokenizer import Tokenizer

MAX_GRAMMAR_CHARACTERS = 256 * 1024
MAX_CPU_SECONDS = 1.0
"""For one guide."""
MAX_SECONDS = 20.0
"""By the clock, for one guide: much more, since a slow or busy machine makes no guide a complex one."""
_START_SECONDS = 60.0
_STACK_BYTES = 2 << 20
_MEMORY_BYTES = 1 << 30
"""Memory beyond what the tokenizer takes."""
_BRIEF_SECONDS = 0.05
"""Most guides take less. One that takes longer goes on at a lower priority: the engine comes first."""
_NICENESS = 10
_MAX_MESSAGE = 500
_LENGTH_BYTES = 8
_BEGUN = b"\n"


class GuideValidator:
    """Tells which guides compile over a tokenizer's vocabulary. The child starts with the first guide.

    Threads may share one; each waits for its own guide only.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._child: _Child | None = None
        self._lock = Lock()
        """Held while the child starts."""
        self._compile_error = lru_cache(maxsize=64)(self._compile)

    def validate(self, guide: Guide, field: str) -> None:
        """Raises RequestError, naming `field`: with what the compiler says against the guide, or the limit
        that it exceeds (INVALID_ARG), or where the process that tries guides out was lost (UNAVAILABLE)."""
        grammar = grammar_of(guide)
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"`{field}`: got a grammar of {len(grammar)} characters;"
                f" allowed: at most {MAX_GRAMMAR_CHARACTERS}"
            )
        try:
            error_text = self._compile_error(grammar)
        except TimeoutError:  # not remembered: it may be the machine's fault
            error_text = f"it took more than {MAX_SECONDS:g} s"
        except ChildProcessError as error:
            raise RequestError(
                f"`{field}`: it was not tried out, as {error}; send it again", ErrorCode.UNAVAILABLE
            ) from error
        if error_text:
            raise RequestError(f"`{field}`: it does not compile: {error_text}")

    def close(self) -> None:
        """Ends the child."""
        with self._lock:
            if self._child is not None:
                self._child.end()
                self._child = None

    def _compile(self, grammar: str) -> str:
        """What is wrong with a grammar; empty: nothing. Raises ChildProcessError, TimeoutError."""
        with self._lock:
            if self._child is None or self._child.has_ended:
                self._child = _Child(self._tokenizer)
                weakref.finalize(self, self._child.end)
            child = self._child
        answer = child.compile(grammar)
        if answer is None:
            child.end()
            raise ChildProcessError("the process for that ended")
        return answer


class _Child:
    """The process that is forked for each guide."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastserve.text.guide_validator", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a stack overflow is reported there
                pass_fds=[theirs.fileno()],
            )
        definition = msgspec.json.encode([tokenizer.backend.to_str(), tokenizer.eos_token_ids])
        if not self._wait_until_ready(definition):
            self.end()
            raise RequestError("the compiler of guides does not start", ErrorCode.INTERNAL)

    def _wait_until_ready(self, definition: bytes) -> bool:
        self._control.settimeout(_START_SECONDS)
        try:
            self._control.sendall(len(definition).to_bytes(_LENGTH_BYTES, "big") + definition)
            return self._control.recv(1) == _BEGUN
        except OSError:
            return False

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    def compile(self, grammar: str) -> str | None:
        """What is wrong with a grammar; None: the child has ended. Raises TimeoutError."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                try:
                    socket.send_fds(self._control, [_BEGUN], [theirs.fileno()])
                except OSError:
                    return None
            ours.settimeout(MAX_SECONDS)
            return _ask(ours, grammar)


def _ask(connection: socket.socket, grammar: str) -> str | None:
    """What a forked process says of a grammar; None where there is none, or there was no fork."""
    answer = b""
    try:
        connection.sendall(grammar.encode())
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(1 << 16):
            answer += piece
    except (ConnectionError, BrokenPipeError):
        pass
    if not answer.startswith(_BEGUN):
        return None
    if answer == _BEGUN:
        limits = f"{MAX_CPU_SECONDS:g} s of processor time, or too much memory"
        return f"it is too complex (it needs more than {limits})"
    return msgspec.json.decode(answer, type=str)


def _serve(control: socket.socket) -> None:
    """The child: forks for each connection that comes through `control`, until that is closed."""
    length = int.from_bytes(control.recv(_LENGTH_BYTES, socket.MSG_WAITALL), "big")
    definition, eos_token_ids = msgspec.json.decode(control.recv(length, socket.MSG_WAITALL))
    tokenizer = LLTokenizer(definition, eos_token=eos_token_ids or None)
    _limit(resource.RLIMIT_STACK, _STACK_BYTES)
    _limit(resource.RLIMIT_AS, _memory_in_use() + _MEMORY_BYTES)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how the forked processes ended
    control.sendall(_BEGUN)
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                control.close()
                _answer(connection, tokenizer)
                os._exit(0)


def _answer(connection: socket.socket, tokenizer: LLTokenizer) -> None:
    """In a forked process: compiles the grammar that comes. The signals of its timers end it."""
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS + 1.0)  # whoever waits has given up by then
    connection.sendall(_BEGUN)
    with connection.makefile("rb") as stream:
        grammar = stream.read().decode()
    # The thread that compiles, which has the process's id, cannot look at the time itself.
    Timer(_BRIEF_SECONDS, os.setpriority, [os.PRIO_PROCESS, os.getpid(), _NICENESS]).start()
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first one does much of the work, and tells if nothing matches
    connection.sendall(msgspec.json.encode(matcher.get_error()[:_MAX_MESSAGE]))


def _memory_in_use() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limit(kind: int, amount: int) -> None:
    """Lowers a limit of this process."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
