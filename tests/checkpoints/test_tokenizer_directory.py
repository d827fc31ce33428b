"""Where a tokenizer's files are found, and how one of a GGUF file gets there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.tokenizer_directory import resolve_tokenizer_directory


def test_tokenizer_of_a_gguf_file_is_converted_once(
    gguf_with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = resolve_tokenizer_directory(gguf_with_tokenizer)
    assert directory.parent == tmp_path / "cache" / "fastserve" / "tokenizers"
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer("ab<|end|>").input_ids == [256, 257]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[x]"

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    moved = gguf_with_tokenizer.rename(tmp_path / "moved.gguf")
    assert resolve_tokenizer_directory(moved) == directory


def test_a_cached_tokenizer_is_found_without_torch(
    gguf_with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = resolve_tokenizer_directory(gguf_with_tokenizer)
    program = (
        "import sys; from pathlib import Path;"
        "from fastserve.checkpoints.model_metadata import eos_token_ids;"
        "from fastserve.checkpoints.tokenizer_directory import resolve_tokenizer_directory;"
        f"gguf = Path({str(gguf_with_tokenizer)!r});"
        "print(resolve_tokenizer_directory(gguf), eos_token_ids(gguf), 'torch' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == f"{directory} [5, 257] False"


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("of our own")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="its tokenizer cannot be converted"):
        resolve_tokenizer_directory(tmp_path / "model.gguf")
    assert list((tmp_path / "cache" / "fastserve" / "tokenizers").iterdir()) == []


def test_a_directory_is_its_own_tokenizer_directory(tmp_path: Path) -> None:
    assert resolve_tokenizer_directory(tmp_path) == tmp_path
