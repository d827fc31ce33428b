"""Which stream decoder does by the token what a tokenizer's own decoder does to a whole sequence."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec

from fastserve.config import ConfigError
from fastserve.text.byte_fallback_decoder import ByteFallbackDecoder
from fastserve.text.detokenizer import ByteLevelDecoder, StreamDecoder
from fastserve.text.piece_decoder import PieceDecoder

_BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2})>")


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
