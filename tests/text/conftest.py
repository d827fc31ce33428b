"""Small tokenizers of each kind, made here, so that no test needs a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from fastserve.text.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] + '\n' + message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_backend() -> Backend:
    """All 256 bytes, a few merges, special tokens, and an added token with a space in it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "w"),
        ("Ã", "©"),
        ("ð", "Ł"),
        ("e", "Ã"),
    ]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("日 本", special=False)])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return backend


def byte_fallback_backend(*, strip: bool) -> Backend:
    """Llama 2's kind (`strip`) and Gemma's: words with a leading space as `▁`, and byte tokens."""
    words = ["<unk>", "▁", "a", "b", "▁a", "▁b", "▁▁▁", "é", "\N{REPLACEMENT CHARACTER}"]
    vocabulary = {token: index for index, token in enumerate([*words, *BYTE_TOKENS])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    stages: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(stages + ([decoders.Strip(" ", 1, 0)] if strip else []))
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def piece_backend(decoder: decoders.Decoder | None) -> Backend:
    """A word vocabulary under one of the decoders that know no bytes."""
    words = ["<unk>", "▁", "a", "▁b", "▁▁c", "##d", "e</w>", "f</w>", ".", "##.", "n't", "do", "not", "é"]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level_backend,
    "byte_fallback": lambda: byte_fallback_backend(strip=False),
    "byte_fallback_strip": lambda: byte_fallback_backend(strip=True),
    "metaspace": lambda: piece_backend(decoders.Metaspace()),
    "word_piece": lambda: piece_backend(decoders.WordPiece()),
    "bpe_suffix": lambda: piece_backend(decoders.BPEDecoder()),
    "no_decoder": lambda: piece_backend(None),
}


def save(backend: Backend, directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Writes the files of a Hugging Face tokenizer whose end token is `</s>`."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One tokenizer of each kind, by its name in BACKENDS."""
    return {kind: Tokenizer(save(make(), tmp_path_factory.mktemp(kind))) for kind, make in BACKENDS.items()}


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """The byte-level one."""
    return tokenizers["byte_level"]


@pytest.fixture
def save_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """Writes the byte-level tokenizer's files, with a `chat_template` of one's own."""
    return partial(save, byte_level_backend(), tmp_path)
