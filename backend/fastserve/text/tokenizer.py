"""The model's tokenizer: text to ids, ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.checkpoints.model_metadata import eos_token_ids as model_eos_token_ids
from fastserve.config import ConfigError
from fastserve.text.chat_template import ChatTemplate
from fastserve.text.detokenizer import IncrementalDetokenizer
from fastserve.text.stream_decoder_factory import stream_decoder_factory


class Tokenizer:
    """A model's tokenizer, from its Hugging Face files."""

    def __init__(self, directory: str | Path, eos_token_ids: list[int] | None = None) -> None:
        """`eos_token_ids`: the model's, where the directory does not tell all of them (GGUF).

        Raises ConfigError where the directory holds no tokenizer that can be streamed from, and ModelError
        where a file beside it is malformed.
        """
        # Imported here: `keep_torch_out` must come before it.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # malformed files break transformers and tokenizers in any way
            raise ConfigError(f"`model`: no tokenizer could be read from {directory}: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"`model`: the tokenizer in {directory} is a {type(tokenizer).__name__};"
                " allowed: one with a tokenizer.json"
            )
        self.chat_template = ChatTemplate(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        """The `tokenizers.Tokenizer` beneath."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.token_ids = frozenset(self.backend.get_vocab(with_added_tokens=True).values())
        """Ids that mean something. The model's own vocabulary may be padded with others."""
        self.vocab_size: int = max(self.token_ids) + 1
        """Every token id is below it."""
        self.special_token_ids = frozenset(
            token_id for token_id, token in self.backend.get_added_tokens_decoder().items() if token.special
        )
        self.eos_token_ids = model_eos_token_ids(Path(directory)) if eos_token_ids is None else eos_token_ids
        """Each ends an answer."""
        self.token_text = cache(self._token_text)
        """What one token adds to a text that has begun (special tokens too)."""
        self._new_stream_decoder = stream_decoder_factory(self.backend)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        `special_tokens`: add those that the tokenizer puts around a text (such as a beginning-of-sequence
        token). Not for a rendered chat, whose template has written them.
        """
        return self.backend.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`. Bytes that are no UTF-8 become U+FFFD; unknown ids are left out."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def new_detokenizer(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """For one sequence that continues this prompt."""
        is_shown = self._is_ordinary if skip_special_tokens else self.token_ids.__contains__
        return IncrementalDetokenizer(self._new_stream_decoder(), is_shown, prompt_token_ids)

    def _is_ordinary(self, token_id: int) -> bool:
        return token_id in self.token_ids and token_id not in self.special_token_ids

    def _token_text(self, token_id: int) -> str:
        alone = self.backend.decode([token_id], skip_special_tokens=False)
        twice = self.backend.decode([token_id, token_id], skip_special_tokens=False)
        # Bytes of a token that only together with others are a character may form another one here.
        return twice[len(alone) :] if twice.startswith(alone) else alone


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer, with the tokens that end an answer of this model."""
    return Tokenizer(files.tokenizer, model_eos_token_ids(files.checkpoint))
