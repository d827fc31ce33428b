"""The default model, a GGUF file with Q4_1 matrices and a Q8_0 embedding, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastserve.checkpoints.model_metadata import eos_token_ids
from fastserve.checkpoints.tokenizer_directory import resolve_tokenizer_directory
from fastserve.models.causal_lm import CausalLM
from fastserve.models.kv_cache import make_kv_caches
from fastserve.models.model_loader import load_model
from fastserve_kernels.attention_metadata import AttentionMetadata

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]
NEW_TOKENS = 16
LICENSE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def tokenizer(default_model_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_tokenizer_directory(default_model_path))


def greedy(model: CausalLM, token_ids: list[int]) -> list[int]:
    """The prompt and its NEW_TOKENS likeliest next tokens."""
    caches = make_kv_caches(model.kv_cache_shapes(num_blocks=8, block_size=16), model.dtype, "cpu")
    computed, tokens = 0, list(token_ids)
    for _ in range(NEW_TOKENS):
        new = tokens[computed:]
        meta = AttentionMetadata.build([len(new)], [len(tokens)], [[5, 1, 7, 2]], 16, model.device)
        hidden = model.forward(torch.tensor(new), meta, caches)
        computed = len(tokens)
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
    return tokens


def test_greedy_tokens_in_float32_equal_those_of_transformers(
    default_model_path: Path, transformers_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(str(default_model_path), "float32")
    for prompt in PROMPTS:
        token_ids = tokenizer(prompt).input_ids
        # Without a mask `generate` takes end tokens in the prompt for padding; without -1 it stops at one.
        expected = transformers_model.generate(  # type: ignore[operator]
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=-1,
        )[0]
        assert greedy(model, token_ids) == expected.tolist()


def test_perplexity_in_bfloat16_is_that_of_transformers(
    default_model_path: Path,
    transformers_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    logits_over_paged_cache: Callable,
) -> None:
    token_ids = tokenizer(LICENSE.read_text()).input_ids
    windows = [token_ids[start : start + 256] for start in range(0, 512, 256)]
    rounded = AutoModelForCausalLM.from_config(transformers_model.config, dtype=torch.bfloat16)
    rounded.load_state_dict(transformers_model.state_dict())
    model = load_model(str(default_model_path))
    assert model.dtype == torch.bfloat16

    def loss(logits: list[Tensor]) -> float:
        scores = torch.cat([window[:-1].float() for window in logits])
        following = torch.tensor([token for window in windows for token in window[1:]])
        return float(torch.nn.functional.cross_entropy(scores, following))

    with torch.inference_mode():
        theirs = [rounded(input_ids=torch.tensor([window])).logits[0] for window in windows]
    assert loss(logits_over_paged_cache(model, windows)) == pytest.approx(loss(theirs), abs=0.005)


def test_end_tokens(default_model_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert eos_token_ids(default_model_path) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
