"""Tiny random models, and a run of one over a scattered paged cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from fastserve.models.causal_lm import CausalLM
from fastserve.models.kv_cache import make_kv_caches
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.formats import Weight

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

Saved = tuple[Path, PreTrainedModel]
SaveModel = Callable[..., Saved]
Entry = dict[str, Any]
Pack = Callable[[Tensor], Weight]
Store = Callable[[Weight], tuple[dict[str, Tensor], Entry]]
"""A weight's tensors by local name, and what the configuration says of it."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other over models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """Makes a random model of a type, saves it, and returns its directory and transformers' own model."""

    def save(model_type: str, max_shard_size: str = "50GB", **config: Any) -> Saved:
        torch.manual_seed(0)
        transformers_config = AutoConfig.for_model(model_type, **(SIZES | config))
        auto_class = AutoModelForSeq2SeqLM if transformers_config.is_encoder_decoder else AutoModelForCausalLM
        model = auto_class.from_config(transformers_config).eval()
        with torch.no_grad():
            # The usual initialisation leaves biases at 0 and norms at 1, which hides their being swapped, and
            # attention so even that hardly any window shows.
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
        return tmp_path / "model", model

    return save


@pytest.fixture
def quantize() -> Callable[..., dict[str, Tensor]]:
    """Quantizes linears in the files of a saved model."""

    def quantize(
        directory: Path,
        packs: Mapping[str, Pack],
        store: Store,
        configure: Callable[[dict[str, Entry]], Entry],
    ) -> dict[str, Tensor]:
        """Those whose last names are keys of `packs`. `configure` makes the configuration's
        `quantization_config` of their entries by module. Returns the dequantized weights by tensor."""
        tensors = load_file(directory / "model.safetensors")
        dequantized: dict[str, Tensor] = {}
        entries: dict[str, Entry] = {}
        for name in sorted(tensors):
            module, _, kind = name.rpartition(".")
            pack = packs.get(module.rpartition(".")[2])
            if pack is not None and kind == "weight":
                weight = pack(tensors.pop(name))
                stored, entries[module] = store(weight)
                tensors |= {f"{module}.{local}": tensor for local, tensor in stored.items()}
                dequantized[name] = weight.dequantize()
        save_file(tensors, directory / "model.safetensors")
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = configure(entries)
        (directory / "config.json").write_text(json.dumps(config))
        return dequantized

    return quantize


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model as llama.cpp's converter does, and rounds the model's own weights as the file does."""

    def write(
        model: PreTrainedModel,
        architecture: str,
        tensor_type: GGMLQuantizationType,
        metadata: Mapping[str, Any] = {},
        tensors: Mapping[str, Tensor] = {},
    ) -> Path:
        """`metadata`: keys of the architecture that not all have; `tensors`: others, in llama.cpp's names."""
        config, path = model.config, tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in {**_gguf_metadata(config), **metadata}.items():
            writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
        writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(config.vocab_size)])
        writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(config.vocab_size)])
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, parameter in model.named_parameters():
            values = parameter.detach().numpy()
            stored_type = tensor_type if values.ndim == 2 and "norm" not in name else GGMLQuantizationType.F32
            stored = gguf.quantize(values, stored_type)
            parameter.data = torch.from_numpy(gguf.dequantize(stored, stored_type).copy())
            head_count = heads.get(name.split(".")[-2])
            if architecture in ("llama", "granite", "smollm3") and head_count is not None:
                halves = stored.reshape(head_count, 2, -1, *stored.shape[1:])
                stored = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(stored.shape)
            if architecture.startswith("gemma") and name.endswith("norm.weight"):
                stored = stored + 1
            gguf_name = names.get_name(name, (".weight", ".bias"))
            assert gguf_name is not None
            writer.add_tensor(gguf_name, stored, raw_dtype=stored_type)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _gguf_metadata(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for each architecture."""
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if hasattr(config, "rms_norm_eps"):
        metadata["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if getattr(config, "head_dim", None):
        metadata["attention.key_length"] = config.head_dim
    return metadata


class PagedRun:
    """Several sequences over one paged cache, whose blocks lie in no order."""

    def __init__(self, model: CausalLM, lengths: list[int], block_size: int = 4) -> None:
        self.model = model
        self.block_size = block_size
        needed = [-(-length // block_size) for length in lengths]
        blocks = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(1)).tolist()
        self.block_tables = [[blocks.pop() for _ in range(count)] for count in needed]
        num_blocks = sum(needed) + 3
        self.caches = make_kv_caches(model.kv_cache_shapes(num_blocks, block_size), model.dtype, "cpu")
        self.computed = [0] * len(lengths)

    def step(self, tokens: dict[int, list[int]]) -> dict[int, Tensor]:
        """Computes the next tokens of some sequences, by number: the logits [tokens, vocab] of each."""
        query_lens = [len(ids) for ids in tokens.values()]
        for sequence, ids in tokens.items():
            self.computed[sequence] += len(ids)
        meta = AttentionMetadata.build(
            query_lens,
            [self.computed[sequence] for sequence in tokens],
            [self.block_tables[sequence] for sequence in tokens],
            self.block_size,
            self.model.device,
        )
        token_ids = torch.tensor([token for ids in tokens.values() for token in ids])
        logits = self.model.logits(self.model.forward(token_ids, meta, self.caches))
        return dict(zip(tokens, logits.split(query_lens), strict=True))


@pytest.fixture
def logits_over_paged_cache() -> Callable[[CausalLM, list[list[int]]], list[Tensor]]:
    """The logits of sequences computed in ragged steps: one whole, one in chunks, one token by token."""

    def run(model: CausalLM, sequences: list[list[int]]) -> list[Tensor]:
        paged = PagedRun(model, [len(ids) for ids in sequences])
        chunk_sizes = [max(map(len, sequences)), 7, 1]
        found: list[list[Tensor]] = [[] for _ in sequences]
        while True:
            tokens = {}
            for number, ids in enumerate(sequences):
                start, size = paged.computed[number], chunk_sizes[number % 3]
                if start < len(ids):
                    tokens[number] = ids[start : start + size]
            if not tokens:
                return [torch.cat(parts) for parts in found]
            for number, logits in paged.step(tokens).items():
                found[number].append(logits)

    return run


@pytest.fixture
def sequences() -> list[list[int]]:
    """Random tokens of several sequences, longer than the sliding windows of the tests."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(3, 199, (length,), generator=generator).tolist() for length in (33, 29, 21, 1, 17, 9)
    ]


@pytest.fixture
def transformers_logits() -> Callable[[PreTrainedModel, list[list[int]]], list[Tensor]]:
    """The logits [tokens, vocab] of each sequence by transformers' own attention, each sequence alone."""

    def run(model: PreTrainedModel, sequences: list[list[int]]) -> list[Tensor]:
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences]

    return run


@pytest.fixture
def equals_transformers(
    sequences: list[list[int]], logits_over_paged_cache: Callable, transformers_logits: Callable
) -> Callable[[CausalLM, PreTrainedModel], None]:
    """Asserts that a model over a paged cache has the logits of transformers' model, but for rounding."""

    def check(model: CausalLM, reference: PreTrainedModel) -> None:
        found = logits_over_paged_cache(model, sequences)
        for logits, expected in zip(found, transformers_logits(reference, sequences), strict=True):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    return check


@pytest.fixture
def relative_error(
    sequences: list[list[int]], logits_over_paged_cache: Callable, transformers_logits: Callable
) -> Callable[[CausalLM, PreTrainedModel], float]:
    """The norm of the difference between the logits of both, relative to that of transformers' logits."""

    def compute(model: CausalLM, reference: PreTrainedModel) -> float:
        found = torch.cat(logits_over_paged_cache(model, sequences))
        expected = torch.cat(transformers_logits(reference, sequences))
        return float((found - expected).norm() / expected.norm())

    return compute
