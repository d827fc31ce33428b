"""The config of the model in a GGUF file: transformers' own, and that of our decoder.

transformers is imported only where its own config is asked for, which takes a second and a half.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fastserve.checkpoints.decoder_config import DecoderConfig
from fastserve.checkpoints.gguf_architectures import ARCHITECTURES, DECODERS
from fastserve.checkpoints.gguf_file import GgufFile
from fastserve.checkpoints.gguf_rope import ROPE_FREQS, rope_parameters
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_metadata import eos_token_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """The config that the metadata describes, as a Hugging Face directory would have it.

    Raises ModelError for an architecture or a scaling of positions that is unknown, and for missing metadata.
    """
    from transformers import AutoConfig

    fields = _fields(file)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _fields(file: GgufFile) -> dict[str, Any]:
    """What `config.json` would have. Raises ModelError as `gguf_config` does."""
    architecture = ARCHITECTURES.get(file.architecture)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{file.path}: GGUF architecture {file.architecture!r} is not one of {known}")
    norm_key = f"attention.layer_norm_{'rms_' if 'rms' in architecture.norm_field else ''}epsilon"
    heads = file.required_value("attention.head_count")
    return {
        "model_type": architecture.model_type,
        "vocab_size": file.vocab_size,
        "hidden_size": file.required_value("embedding_length"),
        "intermediate_size": file.required_value("feed_forward_length"),
        "num_hidden_layers": file.required_value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.architecture_value("attention.head_count_kv", heads),
        "head_dim": file.head_dim,
        architecture.norm_field: file.required_value(norm_key),
        "max_position_embeddings": file.required_value("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": rope_parameters(file),
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_ids(file.path),
        "pad_token_id": None,
    } | architecture.fields(file)


def exportable_gguf_config(file: GgufFile) -> PretrainedConfig:
    """`gguf_config` of a file whose tensors, as `GgufCheckpoint` reads them, can be saved beside it.

    Raises ModelError for an architecture that our decoder has not, and for rotary embeddings that
    transformers cannot describe.
    """
    if file.architecture not in DECODERS:
        known = ", ".join(DECODERS)
        raise ModelError(f"{file.path}: GGUF architecture {file.architecture!r} is not one of {known}")
    if ROPE_FREQS in file.tensors:
        raise ModelError(
            f"{file.path}: its rotary frequencies are scaled one by one; give the model's directory"
        )
    return gguf_config(file)


def gguf_decoder_config(file: GgufFile) -> DecoderConfig:
    """The config of our decoder, with the rotary frequencies of the file.

    Raises ModelError for an architecture or a rotary embedding that our decoder has not.
    """
    fields = _fields(file)
    is_scaled = fields["rope_parameters"]["rope_type"] != "default"  # by transformers' own functions
    described = gguf_config(file) if is_scaled else SimpleNamespace(**fields, hidden_act="silu")
    config = DecoderConfig.from_transformers(described)
    if ROPE_FREQS not in file.tensors:
        return config
    # Llama 3's scaling of the frequencies comes as divisors, computed when the file was made.
    divisors = file.tensors[ROPE_FREQS].data.tolist()
    frequencies = zip(config.inv_freq, divisors, strict=True)
    return replace(config, inv_freq=tuple(frequency / divisor for frequency, divisor in frequencies))
