"""Small random encoders as transformers saves them, with a tokenizer of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
"""The padding is 1, as RoBERTa and MPNet have it."""
WORDS = [f"w{number}" for number in range(96)]
LENGTH = 512
BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1},
    "xlm-roberta": BERT | {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": 100,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": LENGTH,
    },
    "mpnet": BERT | {"max_position_embeddings": LENGTH + 2},
    "modernbert": BERT | {"num_hidden_layers": 4, "local_attention": 24, "classifier_pooling": "mean"},
}
CLASSES = {
    None: AutoModel,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}


def save_encoder(directory: Path, family: str, head: str | None = None, **config: Any) -> PreTrainedModel:
    """Makes a random model of a family and saves it with a tokenizer. `head`: None, "sequence" or "token"."""
    torch.manual_seed(0)
    transformers_config = AutoConfig.for_model(family, **(FAMILIES[family] | config))
    model = CLASSES[head].from_config(transformers_config).eval()
    with torch.no_grad():
        # The usual initialisation leaves biases at 0 and norms at 1, which hides their being swapped.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    save_tokenizer(directory, has_token_types=family in ("bert", "modernbert"))
    return model


def save_tokenizer(directory: Path, has_token_types: bool = True) -> None:
    """A word is a token; around a text stand [CLS] and [SEP]."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=LENGTH,
        model_input_names=names if has_token_types else names[::2],
    ).save_pretrained(directory)
