"""A causal model of transformers without its weights: where its decoder layers are, and how it calls them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastserve.compression.errors import RecipeError

SUPPORTED = (
    "models whose decoder layers (`model.layers`) are made of linears and norms, between "
    "`model.embed_tokens` and `model.norm`: Cohere, ERNIE 4.5, EXAONE 4, GLM, Granite, Llama, Ministral, "
    "Mistral, Nemotron, OLMo 2, Phi-3, Qwen2, Qwen3, SmolLM3, StableLM, Starcoder2"
)
EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class MetaModel:
    """The modules of a model, on the meta device but for its rotary tables."""

    def __init__(self, config: PretrainedConfig, device: torch.device) -> None:
        """Raises RecipeError if the model is no stack of decoder layers as transformers usually has them."""
        self.config = copy.deepcopy(config)
        self.device = device
        self.model = _without_weights(self.config, device)
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise _unsupported(config, "it keeps its decoder layers otherwise than in `layers`")
        self.layers = layers
        names = {module: name for name, module in self.model.named_modules()}
        self.prefix = f"{names[layers]}."
        """What the full names of everything in the layers begin with: `model.layers.`"""

    @classmethod
    def of(cls, config: PretrainedConfig) -> MetaModel:
        """The meta model of a config, on the CPU. Raises RecipeError."""
        return cls(config, torch.device("cpu"))

    def check(self) -> None:
        """Raises RecipeError, before anything is computed, for an architecture that no step can take."""
        others = sorted(
            name for name in self.outer_tensors() if name.rpartition(".")[0] not in (EMBEDDING, NORM, HEAD)
        )
        if others:
            raise _unsupported(self.config, f"it has {', '.join(others[:3])} outside its layers")
        for index, layer in enumerate(self.layers):
            linears = {f"{name}.weight" for name in self.linears(index)}
            matrices = {name for name, parameter in layer.named_parameters() if parameter.dim() > 1}
            left = sorted(matrices - linears, key=lambda name: ("experts" not in name, name))
            if left:
                what = "a mixture of experts" if "experts" in left[0] else "it"
                raise _unsupported(
                    self.config, f"{what} keeps {self.prefix}{index}.{left[0]}, which is no linear"
                )

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    def linears(self, index: int) -> tuple[str, ...]:
        """The local names of a layer's linears: `mlp.up_proj`."""
        return tuple(
            name for name, module in self.layers[index].named_modules() if isinstance(module, nn.Linear)
        )

    def tensors(self, index: int) -> tuple[str, ...]:
        """The local names of a layer's tensors: `mlp.up_proj.weight`."""
        return tuple(self.layers[index].state_dict())

    def outer_tensors(self) -> tuple[str, ...]:
        """The full names of the tensors outside the layers, without a head that is the embedding."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        return tuple(
            name for name in self.model.state_dict() if not name.startswith(self.prefix) and name not in tied
        )

    def outer_matrices(self) -> tuple[str, ...]:
        """The full names of the modules outside the layers that are an embedding or a linear."""
        found = (
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding | nn.Linear) and not name.startswith(self.prefix)
        )
        present = set(self.outer_tensors())
        return tuple(name.removesuffix(".weight") for name in found if name in present)

    def materialize(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        """A layer with weights, in float32: `tensors` by local name."""
        layer = copy.deepcopy(self.layers[index]).to_empty(device=self.device).float()
        layer.load_state_dict(tensors)
        return layer.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, embedding: Tensor, token_ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The hidden states [samples, T, hidden] float32 before the first layer of token_ids [samples, T],
        and the keyword arguments with which the model calls each of its layers for a sequence so long."""
        decoder = copy.deepcopy(self.model.get_decoder())
        recorders = [_Recorder() for _ in decoder.layers]
        for layer, recorder in zip(decoder.layers, recorders, strict=True):
            layer.forward = recorder
        decoder.norm = nn.Identity()
        hidden = torch.empty(*token_ids.shape, embedding.shape[1], device=self.device)
        for entering, sequence in zip(hidden, token_ids, strict=True):
            embedded = embedding[sequence].to(self.device, torch.float32)
            decoder(inputs_embeds=embedded[None], use_cache=False)
            entering.copy_(recorders[0].hidden[0])
        return hidden, [recorder.arguments for recorder in recorders]


class _Recorder:
    """Stands for a layer's computation: keeps what it was called with last, and changes nothing."""

    hidden: Tensor
    arguments: dict[str, Any]

    def __call__(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden


def _without_weights(config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise _unsupported(config, "transformers has no causal language model of this type") from error
    decoder = model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is not None:
        # Its tables are computed, not loaded.
        decoder.rotary_emb = type(rotary)(config=config).to(device)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise _unsupported(config, f"it computes {', '.join(left)} as it is made")
    return model.eval()


def _unsupported(config: PretrainedConfig, reason: str) -> RecipeError:
    return RecipeError(
        f"model: one of the type {config.model_type} cannot be compressed: {reason}; supported: {SUPPORTED}"
    )
