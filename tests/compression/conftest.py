"""A tiny random model, a few windows of random tokens, and the running of steps on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from tests.models.conftest import _one_thread
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastserve.compression.state.model_state import SavedState, State, StateWriter
from fastserve.compression.state.source_state import SourceState
from fastserve.compression.step import Context, Step

__all__ = ["_one_thread"]

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}

SaveTiny = Callable[..., Path]
RunStep = Callable[..., SavedState]


@pytest.fixture
def save_tiny(tmp_path: Path) -> SaveTiny:
    """Makes a random model, saves it in a dtype, and returns its directory."""

    def save(model_type: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | config)))
        with torch.no_grad():
            # The usual initialisation leaves biases at 0 and norms at 1, which hides their being swapped.
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        directory = tmp_path / f"{model_type}-{dtype}".replace("torch.", "")
        model.to(dtype).save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def save_byte_model(save_tiny: SaveTiny, save_byte_tokenizer: Callable[..., Path]) -> SaveTiny:
    """Makes a random model whose tokens are bytes, saves it with its tokenizer, and returns its directory."""

    def save(**config: Any) -> Path:
        directory = save_tiny(vocab_size=257, **config)
        for file in save_byte_tokenizer().glob("tokenizer*"):
            (directory / file.name).write_bytes(file.read_bytes())
        return directory

    return save


@pytest.fixture
def source(save_tiny: SaveTiny) -> SourceState:
    """A tiny Llama in float32."""
    return SourceState(save_tiny())


def make_context(source: State) -> Context:
    """Eight windows of 32 random tokens, and two to hold out."""
    windows = torch.randint(3, SIZES["vocab_size"], (10, 32), generator=torch.Generator().manual_seed(1))
    return Context(
        source, windows[:8], windows[:8], windows[8:], torch.device("cpu"), Progress(disable=True), 0
    )


@pytest.fixture
def context(source: SourceState) -> Context:
    return make_context(source)


@pytest.fixture
def run_step(tmp_path: Path) -> RunStep:
    """Runs a step on a state and returns the next one; `name` is a directory's."""

    def run(step: Step, before: State, name: str = "after") -> SavedState:
        after = StateWriter(tmp_path / name)
        step.run(before, after, make_context(before))
        after.finish()
        return SavedState(tmp_path / name)

    return run


@pytest.fixture(scope="session")
def save_byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tokenizer with a token for every byte, and returns its directory; with `begin` it puts <s>
    before every text."""

    def save(begin: bool = False) -> Path:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<s>", special=True)])
        if begin:
            start = backend.token_to_id("<s>")
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", start)]
            )
        directory = tmp_path_factory.mktemp("tokenizer")
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>").save_pretrained(directory)
        (directory / "config.json").write_text("{}")
        return directory

    return save
