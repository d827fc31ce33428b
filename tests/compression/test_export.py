"""The directory of a result: we load it, and transformers too where compressed-tensors has the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from fastserve.compression.state import export as exporting
from fastserve.compression.state.export import export
from fastserve.compression.state.model_state import SavedState, State, StateWriter
from fastserve.models.kv_cache import make_kv_caches
from fastserve.models.model_loader import load_model
from fastserve_kernels.attention_metadata import AttentionMetadata
from fastserve_kernels.formats import (
    FP8,
    NF4,
    W8A8,
    Bitmap,
    BlockSparse,
    Dense,
    Int4,
    Int8,
    IntRows,
    LowRank,
    Sparse24,
    Sparse24Int4,
    Weight,
)

Pack = Callable[[Tensor], Weight]
LIBRARY: dict[str, Pack] = {
    "dense": Dense,
    "int4": lambda w: Int4.pack(w, 32),
    "int4 with zeros": lambda w: Int4.pack(w, 32, symmetric=False),
    "int8": lambda w: Int8.pack(w, 64),
    "int8 with zeros": lambda w: Int8.pack(w, 32, symmetric=False),
    "fp8": FP8.pack,
    "w8a8": W8A8.pack,
    "2:4": Sparse24.pack,
    "2:4 in int4": lambda w: Sparse24Int4.pack(w, 32),
}
OWN: dict[str, Pack] = {
    "int rows": lambda w: IntRows.pack(w, (2 + torch.arange(len(w)) % 7).byte(), 32, symmetric=False),
    "nf4": NF4.pack,
    "low rank": lambda w: LowRank.pack(w, 16),
    "bitmap": lambda w: Bitmap.pack(w, density=0.5),
    "blocks": lambda w: BlockSparse.pack(w, (16, 16), 0.5),
    "int4 with zeros between the codes": lambda w: Int4(
        Int4.pack(w, 32).codes, Int4.pack(w, 32).scales, torch.full((len(w), w.shape[1] // 32), 7.5), 32
    ),
}
TOKENS = torch.arange(40) * 37 % 128


@pytest.fixture
def write(source: State, tmp_path: Path) -> Callable[..., tuple[SavedState, Path]]:
    """Exports the tiny model with each linear packed by `pack(layer, local name, weight)`."""

    def run(pack: Callable[[int, str, Tensor], Weight], outer: Pack = Dense) -> tuple[SavedState, Path]:
        writer = StateWriter(tmp_path / "state")
        for index in range(source.num_layers):
            packed: dict[str, Tensor | Weight] = {
                name: pack(index, name, w.dequantize()) for name, w in source.linears(index).items()
            }
            writer.write_layer(index, packed | source.others(index))
        writer.write_outer(
            {
                name: outer(p.dequantize()) if isinstance(p, Weight) else p
                for name, p in source.outer().items()
            }
        )
        writer.write_config(source.config)
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
            (tokenizer / name).write_text("{}")
        state = SavedState(tmp_path / "state")
        export(state, tokenizer, tmp_path / "out")
        return state, tmp_path / "out"

    return run


def logits_of(directory: Path) -> Tensor:
    """Ours, [tokens, vocab]."""
    model, length = load_model(str(directory), "float32"), len(TOKENS)
    caches = make_kv_caches(model.kv_cache_shapes(1, length), model.dtype, "cpu")
    metadata = AttentionMetadata.build([length], [length], [[0]], length, model.device)
    return model.logits(model.forward(TOKENS, metadata, caches))


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def expected_logits(state: State) -> Tensor:
    return state.transformers_model(torch.float32)(input_ids=TOKENS[None]).logits[0]


@pytest.mark.parametrize("kind", [*LIBRARY, *OWN])
def test_what_is_written_loads_here(kind: str, write: Callable) -> None:
    pack = (LIBRARY | OWN)[kind]
    state, directory = write(lambda _, __, w: pack(w))
    tolerance = 0.05 if kind == "w8a8" else 1e-4  # the dense model does not round its activations
    assert difference(logits_of(directory), expected_logits(state)) < tolerance
    quantization = json.loads((directory / "config.json").read_text()).get("quantization_config")
    if kind in ("dense", "2:4"):
        assert quantization is None
    else:
        assert quantization["quant_method"] == ("fastserve" if kind in OWN else "compressed-tensors")


@pytest.mark.parametrize("kind", LIBRARY)
def test_transformers_loads_it_as_any_checkpoint(kind: str, write: Callable) -> None:
    _, directory = write(lambda _, __, w: LIBRARY[kind](w))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(input_ids=TOKENS[None]).logits[0]
    # The library divides the activations of w8a8 by max / 127.5, we by max / 127.
    assert difference(logits_of(directory), theirs) < (0.05 if kind == "w8a8" else 1e-4)


def mixed(layer: int, name: str, weight: Tensor) -> Weight:
    kinds: list[Pack] = [
        Dense,
        lambda w: Int4.pack(w, 32),
        lambda w: Int8.pack(w),
        Sparse24.pack,
        lambda w: Int4.pack(w, 64),
    ]
    return kinds[(layer + len(name)) % len(kinds)](weight)


def test_layers_of_different_formats_load_here_and_there(write: Callable) -> None:
    state, directory = write(mixed)
    expected = expected_logits(state)
    assert difference(logits_of(directory), expected) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        assert difference(model(input_ids=TOKENS[None]).logits[0], expected) < 1e-4


def test_an_embedding_in_few_bits_loads_here(write: Callable) -> None:
    state, directory = write(
        lambda _, __, w: Int4.pack(w, 32), outer=lambda w: Int8.pack(w, 64, symmetric=False)
    )
    assert difference(logits_of(directory), expected_logits(state)) < 1e-4
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "fastserve"  # transformers fails on such embeddings


def test_2_of_4_is_2_of_4_again(write: Callable) -> None:
    _, directory = write(lambda _, __, w: Sparse24.pack(w))
    names = json.loads((directory / "config.json").read_text())["fastserve_two_of_four"]
    assert len(names) == 21
    from fastserve.checkpoints.quant_methods import open_checkpoint

    checkpoint = open_checkpoint(directory, AutoConfig.from_pretrained(directory))
    assert all(isinstance(checkpoint.read_packed(f"{name}.weight", exact=True), Sparse24) for name in names)


def test_the_directory_is_whole_and_ordinary(write: Callable) -> None:
    _, directory = write(lambda _, __, w: Int4.pack(w, 32, symmetric=False))
    assert sorted(file.name for file in directory.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert quantization["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert quantization["ignore"] == ["lm_head"]
    assert CompressedTensorsConfig.from_dict(quantization).quantization_config.format == "pack-quantized"


def test_a_large_model_is_several_files(write: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "SHARD_BYTES", 30_000)
    state, directory = write(lambda _, __, w: NF4.pack(w))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert difference(logits_of(directory), expected_logits(state)) < 1e-4
