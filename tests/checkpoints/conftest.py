"""The tiny models of `tests/models`: what tests of checkpoints read is written by the same fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.models.conftest import (
    _one_thread,
    equals_transformers,
    logits_over_paged_cache,
    quantize,
    relative_error,
    save_model,
    sequences,
    transformers_logits,
    write_gguf,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = [
    "_one_thread",
    "equals_transformers",
    "logits_over_paged_cache",
    "quantize",
    "relative_error",
    "save_model",
    "sequences",
    "transformers_logits",
    "write_gguf",
]

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture
def write_tokenizer_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a GGUF file with a tokenizer and no tensors; `keys` are those of `tokenizer.ggml`."""

    def write(model: str, tokens: list[str], chat_template: str | None = None, **keys: Any) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_tokenizer_model(model)
        writer.add_token_list(tokens)
        for key, value in keys.items():
            writer.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.get_type(value))
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        # transformers wants to see a whole model's config before it looks at the tokenizer.
        writer.add_context_length(16)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "model.gguf"

    return write


@pytest.fixture
def gguf_with_tokenizer(write_tokenizer_gguf: Callable[..., Path]) -> Path:
    """A file with a byte-level vocabulary, one merge and one control token."""
    return write_tokenizer_gguf(
        "gpt2",
        [*bytes_to_unicode().values(), "ab", "<|end|>"],
        TEMPLATE,
        pre="smollm",
        token_type=[1] * 257 + [3],
        merges=["a b"],
        eos_token_id=257,
        eot_token_id=5,
    )
