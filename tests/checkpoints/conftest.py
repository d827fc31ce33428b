"""The tiny models of `tests/models`: what tests of checkpoints read is written by the same fixtures."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from tests.models.conftest import (
    _one_thread,
    logits_over_paged_cache,
    quantize,
    save_model,
    sequences,
    transformers_logits,
    write_gguf,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = [
    "_one_thread",
    "logits_over_paged_cache",
    "quantize",
    "save_model",
    "sequences",
    "transformers_logits",
    "write_gguf",
]

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture
def gguf_with_tokenizer(tmp_path: Path) -> Path:
    """A file with a byte-level vocabulary, one merge and one control token."""
    tokens = [*bytes_to_unicode().values(), "ab", "<|end|>"]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    writer.add_eot_token_id(5)
    writer.add_chat_template(TEMPLATE)
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
