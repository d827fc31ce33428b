"""`python -m fastserve.checkpoints.gguf_tokenizer GGUF DIRECTORY` saves the tokenizer of a GGUF file.

A program of its own, because the conversion imports torch and the processes that want the tokenizer do not.

transformers 5.23 converts the vocabulary and the merges. What it passes over is done here: how text is cut
before the merges (`tokenizer.ggml.pre`), which it knows for a part of the names and takes for GPT-2's in all
others, whether words of the vocabulary go before merges, and `tokenizer.ggml.add_space_prefix`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from fastserve.checkpoints.gguf_file import GgufFile

_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum")
"""The pre-tokenizers that cut as GPT-2's."""
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""The pre-tokenizers that cut out each digit first."""
_QWEN2 = ("stablelm2", "hunyuan", "solar-open")
"""The pre-tokenizers that cut as Qwen2's, and that transformers does not name."""
_WORDS_FIRST = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"
)  # fmt: skip
"""The pre-tokenizers with which a piece of text that is a token is that token, whatever merges make of it,
and a token for the beginning stands before the text unless the file says otherwise."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPACE = "▁"


def convert(gguf: Path, directory: Path) -> None:
    """Saves the tokenizer of the file `gguf` into `directory` as transformers does.

    Raises ValueError for a tokenizer that cannot be converted.
    """
    file = GgufFile(gguf)
    pre = file.value("tokenizer.ggml.pre")
    is_byte_level = file.value("tokenizer.ggml.model") == "gpt2"
    options: dict[str, Any] = {}
    if is_byte_level and pre in _WORDS_FIRST and file.value("tokenizer.ggml.add_bos_token") is None:
        options["add_bos_token"] = True
    converted = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
    backend = converted.backend_tokenizer
    if is_byte_level:
        _set_pre_tokenizer(backend, pre)
    elif file.value("tokenizer.ggml.model") == "llama":
        _set_space_prefix(backend, file.value("tokenizer.ggml.add_space_prefix", True))
    _save(converted, backend, directory)


def _set_pre_tokenizer(backend: Tokenizer, name: str | None) -> None:
    """Has the text cut as llama.cpp cuts it. Raises ValueError if we do not know how that is."""
    known = {*_GPT2, *_DIGITS, *_QWEN2, *GGUF_PRE_TOKENIZER_SPLITS}
    if name not in known:
        raise ValueError(
            f"tokenizer.ggml.pre: got {name!r}; allowed: {', '.join(sorted(known))}. How another "
            "one cuts text is not known here, and a wrong cut gives wrong tokens: give the model's directory"
        )
    if name in _WORDS_FIRST:
        backend.model.ignore_merges = True
    if name in _DIGITS:
        by_digit = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([by_digit, _byte_level(use_regex=True)])
    elif name in _GPT2:
        backend.pre_tokenizer = _byte_level(use_regex=True)
    else:
        split = GGUF_PRE_TOKENIZER_SPLITS["qwen2" if name in _QWEN2 else name]
        by_regex = pre_tokenizers.Split(Regex(split), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([by_regex, _byte_level(use_regex=False)])


def _byte_level(use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _set_space_prefix(backend: Tokenizer, prefix: bool) -> None:
    """Sets whether a space is put before each text, which decoding takes away again.

    The first of several spaces counts as one too, as in SentencePiece: "  a" is three spaces and a letter.
    """
    spaces = normalizers.Replace(" ", _SPACE)
    prepended = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*prepended, spaces])
    backend.pre_tokenizer = None
    decoder: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*decoder, decoders.Strip(content=" ", left=1)] if prefix else decoder
    )


def _save(converted: PreTrainedTokenizerBase, backend: Tokenizer, directory: Path) -> None:
    """Saves under the class that takes `tokenizer.json` as it is: others make parts of it anew."""
    special = {name: getattr(converted, name) for name in _SPECIAL}
    saved = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in special.items() if token is not None}
    )
    saved.chat_template = converted.chat_template
    saved.save_pretrained(directory)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(str(error))
