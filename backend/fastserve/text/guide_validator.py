"""Trying guides out in a process that may die of it.

The compiler of llguidance 1.9 was seen to end its process over a guide, and to stay busy over one for hours;
no bound on the size of a guide tells which. So a guide is compiled in a child process first,
with less stack than others have and little time. What passes there, an engine may compile.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import weakref
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import msgspec
from llguidance import LLMatcher, LLTokenizer

from fastserve.errors import ErrorCode, RequestError
from fastserve.text.guide import grammar_of
from fastserve.types import Guide

if TYPE_CHECKING:  # the child needs no transformers
    from fastserve.text.tokenizer import Tokenizer

MAX_GRAMMAR_CHARACTERS = 256 * 1024
MAX_SECONDS = 1.0
"""Processor time for one guide."""
_STACK_BYTES = 2 << 20
_MEMORY_BYTES = 2 << 30
_MAX_MESSAGE = 500


class GuideValidator:
    """Tells which guides compile over a tokenizer's vocabulary. The child starts with the first guide."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self._complaint = lru_cache(maxsize=64)(self._compile)

    def validate(self, guide: Guide, field: str) -> None:
        """Raises RequestError, naming `field`, with what the compiler says against the guide."""
        grammar = grammar_of(guide)
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"`{field}`: got a grammar of {len(grammar)} characters;"
                f" allowed: at most {MAX_GRAMMAR_CHARACTERS}"
            )
        complaint = self._complaint(grammar)
        if complaint:
            raise RequestError(f"`{field}`: it does not compile: {complaint}")

    def _compile(self, grammar: str) -> str:
        """What is wrong with a grammar; empty: nothing."""
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._child = self._start()
            answer = _ask(self._child, grammar)
            if answer is None:
                self._child.wait()
                return f"it is too complex (it needs more than {MAX_SECONDS:g} s, or too much memory)"
            return answer

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-m", "fastserve.text.guide_validator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a stack overflow is reported there
        )
        weakref.finalize(self, _end, child)
        if _ask(child, [self._tokenizer.backend.to_str(), self._tokenizer.eos_token_ids]) is None:
            raise RequestError("the compiler of guides does not start", ErrorCode.INTERNAL)
        return child


def _ask(child: subprocess.Popen[bytes], message: Any) -> str | None:
    """The child's answer; None if it died of the message."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(msgspec.json.encode(message) + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return None
    line = child.stdout.readline()
    return msgspec.json.decode(line, type=str) if line else None


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def _serve() -> None:
    """The child: reads a tokenizer and then grammars, a line of JSON each; answers each with a line."""
    definition, eos_token_ids = msgspec.json.decode(sys.stdin.buffer.readline())
    tokenizer = LLTokenizer(definition, eos_token=eos_token_ids or None)
    _limit(resource.RLIMIT_STACK, _STACK_BYTES)
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)
    _answer("")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # its signal ends the process
        matcher = LLMatcher(tokenizer, msgspec.json.decode(line), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first one does much of the work, and tells if nothing matches
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _answer(matcher.get_error()[:_MAX_MESSAGE])


def _answer(text: str) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(text) + b"\n")
    sys.stdout.buffer.flush()


def _limit(kind: int, amount: int) -> None:
    """Lowers a limit of this process."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


if __name__ == "__main__":
    _serve()
