"""A tokenizer whose decoder is not known cannot be served."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from fastserve.config import ConfigError
from fastserve.text.stream_decoder_factory import stream_decoder_factory


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
    ],
)
def test_unknown_decoder_is_refused_when_loading(decoder: decoders.Decoder) -> None:
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoder
    with pytest.raises(ConfigError, match=r"decoder is .*; allowed: ByteLevel"):
        stream_decoder_factory(backend)
