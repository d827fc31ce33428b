"""Guided decoding: which tokens a JSON schema, a regex, a choice or a grammar allows next (by llguidance)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from fastserve.errors import ErrorCode, RequestError
from fastserve.text.guide import grammar_of
from fastserve.types import Guide


class GuideMatcher:
    """The place that one sequence has reached in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)

    def mask(self, logits: torch.Tensor) -> RequestError | None:
        """Sets the logits [vocab] of tokens that the grammar does not allow next to minus infinity."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            return self._error()
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
        return self._error()

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def _error(self) -> RequestError:
        return RequestError(f"`structured_outputs`: {self._matcher.get_error()}", ErrorCode.INTERNAL)


class CompiledGuide:
    """A guide that can be followed any number of times."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def matcher(self) -> GuideMatcher:
        """A matcher at the beginning."""
        return GuideMatcher(self._matcher.deep_copy(), self._vocab_size)


class GuideCompiler:
    """Compiles guides over one tokeniser, which is prepared when the first guided request comes.

    Either can take a second, so a thread of its own does it while the engine's steps go on.
    """

    def __init__(self, tokenizer_directory: Path, eos_token_ids: list[int], vocab_size: int) -> None:
        self._directory = tokenizer_directory
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._compiled = lru_cache(maxsize=256)(self._compile)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="guides")

    def compile(self, guide: Guide) -> Future[CompiledGuide]:
        """The compiled guide, or RequestError if it does not compile."""
        return self._thread.submit(self._compiled, grammar_of(guide))

    def _compile(self, grammar: str) -> CompiledGuide:
        matcher = LLMatcher(self._tokenizer(), grammar)
        if matcher.is_error():
            raise RequestError(f"`structured_outputs`: {matcher.get_error()}")
        return CompiledGuide(matcher, self._vocab_size)

    @lru_cache(maxsize=1)  # noqa: B019  one instance lives as long as its worker
    def _tokenizer(self) -> LLTokenizer:
        definition = (self._directory / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(definition, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
