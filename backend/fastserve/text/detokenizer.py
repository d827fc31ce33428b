"""Incremental detokenization: what each kind of `tokenizers` decoder does to a whole sequence, by the token.

`tokenizers.decoders.DecodeStream` decodes a growing window of ids until its text no longer ends in U+FFFD.
It holds back for ever, at quadratic cost, when a model emits bytes that are no UTF-8, and it cannot be
flushed. The decoders here know the bytes of each token instead: each token costs the same, and the texts of
all `push`es and of `flush`, joined, are exactly `backend.decode(ids)`.

An answer is the continuation of its prompt: a first word has a space before it that many decoders drop at the
beginning of a text. So a decoder may be told what came before by `prime`; what it gives then is what
`backend.decode(before + ids)` has more than `backend.decode(before)`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import islice
from typing import Any, Protocol

import msgspec

from fastserve.config import ConfigError

CONTEXT_TOKENS = 4
"""So many tokens before decide how a text goes on: no character has more bytes."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2})>")


class StreamDecoder(Protocol):
    """The text of one sequence of known token ids, as far as it is certain."""

    def prime(self, token_ids: list[int]) -> None:
        """Makes the sequence one that comes after these, the last CONTEXT_TOKENS of an earlier text, or all.

        To be called before anything is pushed. A character that they begin and the sequence completes is the
        sequence's. Bytes of theirs that become no character are not shown: the earlier text had U+FFFD there.
        """

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; may be empty."""

    def flush(self) -> str:
        """The text held back: no more tokens will come."""


class IncrementalDetokenizer:
    """Turns the ids of one sequence into text as they come.

    The texts of all pushes and of the flush, joined, are what `Tokenizer.decode` of the prompt and all ids
    has more than that of the prompt; ids that the tokenizer does not know have no text. No text ends in the
    middle of a character: what could still become one is held back. One that the prompt's ids begin and
    these complete is shown whole.
    """

    def __init__(
        self, decoder: StreamDecoder, is_shown: Callable[[int], bool], prompt_token_ids: Sequence[int]
    ) -> None:
        """`is_shown`: whether an id has a text; others are left out."""
        self._decoder = decoder
        self._is_shown = is_shown
        context = list(islice(filter(is_shown, reversed(prompt_token_ids)), CONTEXT_TOKENS))
        self._decoder.prime(context[::-1])

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that has become certain with these tokens."""
        return "".join(map(self._decoder.push, filter(self._is_shown, token_ids)))

    def flush(self) -> str:
        """The text held back. Nothing may be pushed after."""
        return self._decoder.flush()


class ByteLevelDecoder:
    """For vocabularies of byte strings (GPT-2, Llama 3, Qwen, SmolLM): all bytes together are UTF-8.

    Holds back at most the first bytes of one character.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._follows_unfinished = False

    def prime(self, token_ids: list[int]) -> None:
        """Keeps the bytes of an unfinished character."""
        for token_id in token_ids:
            self.push(token_id)
        self._follows_unfinished = bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        """The characters that the token's bytes complete."""
        return self._show(self._utf8.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """U+FFFD for an unfinished character."""
        return self._show(self._utf8.decode(b"", final=True))

    def _show(self, text: str) -> str:
        if self._follows_unfinished and text:
            self._follows_unfinished = False
            return text.removeprefix(REPLACEMENT)
        return text


class ByteFallbackDecoder:
    """For vocabularies of text whose missing characters are spelled in byte tokens (Llama 2, Mistral, Gemma).

    A run of byte tokens is text if the whole run is UTF-8, and one U+FFFD per byte if not. So a run is held
    back until it ends, or until it is certain that it is no UTF-8.
    """

    def __init__(self, token_piece: Callable[[int], str | int], stripped: str, max_stripped: int) -> None:
        """`token_piece`: a token's text, or the value of a byte token. Of the character `stripped`, up to
        `max_stripped` at the beginning of the whole text are dropped."""
        self._token_piece = token_piece
        self._stripped = stripped
        self._left_to_strip = max_stripped
        self._start_run()

    def prime(self, token_ids: list[int]) -> None:
        """Keeps the bytes of an unfinished character; the beginning of the text has been before."""
        if not token_ids:
            return
        self._left_to_strip = 0
        for token_id in token_ids:
            self.push(token_id)
            if self._run_is_broken:  # by the rest of a character that began before these tokens
                self._start_run()
        unfinished = self._utf8.getstate()[0]
        self._start_run()
        self._utf8.decode(unfinished)

    def push(self, token_id: int) -> str:
        """The token's text, after that of the byte tokens before it; nothing yet for a byte token."""
        piece = self._token_piece(token_id)
        if isinstance(piece, int):
            return self._strip(self._push_byte(piece))
        return self._strip(self._end_run() + piece)

    def flush(self) -> str:
        """The text of the byte tokens at the end."""
        return self._strip(self._end_run())

    def _start_run(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._run_text = ""
        self._run_length = 0
        self._run_is_broken = False

    def _push_byte(self, byte: int) -> str:
        if self._run_is_broken:
            return REPLACEMENT
        self._run_length += 1
        try:
            self._run_text += self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._run_is_broken = True
            return REPLACEMENT * self._run_length
        return ""

    def _end_run(self) -> str:
        text = self._run_text
        unfinished = self._utf8.getstate()[0]
        if self._run_is_broken:
            text = ""
        elif unfinished:  # bytes of a character that was never completed
            text = REPLACEMENT * self._run_length
        if self._run_length or unfinished:
            self._start_run()
        return text

    def _strip(self, text: str) -> str:
        while text and self._left_to_strip:
            if text[0] != self._stripped:
                self._left_to_strip = 0
                break
            text = text[1:]
            self._left_to_strip -= 1
        return text


class PieceDecoder:
    """For decoders without bytes, where a token's text depends on nothing but the token before it
    (Metaspace, WordPiece, BPEDecoder, none)."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._last: list[int] = []

    def prime(self, token_ids: list[int]) -> None:
        """Keeps the last token."""
        self._last = token_ids[-1:]

    def push(self, token_id: int) -> str:
        """What the token adds to the text of the token before it."""
        text = self._decode([*self._last, token_id])[len(self._decode(self._last)) :]
        self._last = [token_id]
        return text

    def flush(self) -> str:
        """Nothing: no text is held back."""
        return ""


def stream_decoder_factory(backend: Any) -> Callable[[], StreamDecoder]:
    """Makes the stream decoders of a `tokenizers.Tokenizer`. Raises ConfigError for an unknown decoder."""
    stages = _stages(backend)
    kinds = [stage["type"] for stage in stages]
    if kinds == ["ByteLevel"]:
        token_bytes = _token_bytes(backend)
        return lambda: ByteLevelDecoder(token_bytes)
    if "ByteFallback" in kinds:
        return _byte_fallback_factory(backend, stages, kinds)
    if kinds in ([], ["Metaspace"], ["WordPiece"], ["BPEDecoder"]):
        return lambda: PieceDecoder(lambda ids: backend.decode(ids, skip_special_tokens=False))
    raise _unknown_decoder(kinds)


def _stages(backend: Any) -> list[dict[str, Any]]:
    """The steps of the backend's decoder, each as in tokenizer.json."""
    if backend.decoder is None:
        return []
    decoder = msgspec.json.decode(backend.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _byte_fallback_factory(
    backend: Any, stages: list[dict[str, Any]], kinds: list[str]
) -> Callable[[], StreamDecoder]:
    """For: replacements in each token, then ByteFallback, Fuse, and at most one Strip of the beginning."""
    at = kinds.index("ByteFallback")
    replacements, after = stages[:at], stages[at + 1 :]
    strip: dict[str, Any] = (
        after[1] if kinds[at + 2 :] == ["Strip"] else {"content": " ", "start": 0, "stop": 0}
    )
    is_known = (
        all(stage["type"] == "Replace" and "String" in stage["pattern"] for stage in replacements)
        and kinds[at + 1 :] in (["Fuse"], ["Fuse", "Strip"])
        and strip["stop"] == 0
    )
    if not is_known:
        raise _unknown_decoder(kinds)
    token_piece = _token_piece(backend, [(s["pattern"]["String"], s["content"]) for s in replacements])
    return lambda: ByteFallbackDecoder(token_piece, strip["content"], strip["start"])


def _unknown_decoder(kinds: list[str]) -> ConfigError:
    return ConfigError(
        f"`model`: its tokenizer's decoder is {' + '.join(kinds)}; allowed: ByteLevel, Metaspace, WordPiece,"
        " BPEDecoder, none, or Replace + ByteFallback + Fuse + Strip"
    )


def _token_bytes(backend: Any) -> Callable[[int], bytes]:
    byte_of = _bytes_by_character()

    @cache
    def token_bytes(token_id: int) -> bytes:
        token = backend.id_to_token(token_id)
        if all(character in byte_of for character in token):
            return bytes(byte_of[character] for character in token)
        return token.encode()  # an added token, kept as it is

    return token_bytes


def _token_piece(backend: Any, replacements: list[tuple[str, str]]) -> Callable[[int], str | int]:
    @cache
    def token_piece(token_id: int) -> str | int:
        token = backend.id_to_token(token_id)
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        byte = _BYTE_TOKEN.fullmatch(token)
        return int(byte[1], 16) if byte else token

    return token_piece


def _bytes_by_character() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 bytes stand for themselves, the others for
    the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
