"""Any other causal model of transformers: its own modules compute, our paged cache holds keys and values.

Not every model can work this way: some keep a state other than keys and values, some bring biases or masks of
their own. So a model is served only after a check at load: a short random prompt goes through transformers'
attention and through ours, in two ragged steps, and the logits must agree. That costs three forward passes of
two dozen tokens, little beside the loading of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fastserve.checkpoints.kv_cache_scheme import KVCacheShapes
from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_metadata import context_length
from fastserve.checkpoints.safetensors_files import open_safetensors, weight_files
from fastserve.models.attention_interface import (
    ATTENTION,
    PROBE_BLOCK_SIZE,
    ForwardContext,
    ProbeContext,
    forward_context,
)
from fastserve.models.causal_lm import resolve_max_model_len
from fastserve.models.expert_routing import RecordRouting, ReplayRouting
from fastserve.models.falcon_attention import use_paged_falcon_attention
from fastserve.models.kv_cache import KVCaches
from fastserve_kernels.attention_metadata import AttentionMetadata

_PROMPT_LENGTH = 2 * PROBE_BLOCK_SIZE + 5
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}
"""Allowed norm of the difference of centred logits, relative to theirs: rounding, summed over the layers of a
real model, stays below; a lost bias, window or state is far above."""


class TransformersModel:
    """A `CausalLM` around a model of transformers."""

    def __init__(self, model: PreTrainedModel, max_position: int) -> None:
        """Takes the model over: from now on its attention is ours, and its body and its head run apart.

        Raises ModelError if it cannot be served.
        """
        config = model.config.get_text_config()
        self.max_position = max_position
        self.vocab_size: int = config.vocab_size
        self.dtype = model.dtype
        self.device = model.device
        prompt = _random_prompt(self.vocab_size, self.device)[:max_position]
        choices = RecordRouting()
        with torch.inference_mode(), choices:
            expected = model(input_ids=prompt[None], use_cache=False).logits[0].float()
        _use_paged_attention(model)
        self._body, self._given, self._head = _take_apart(model)
        self._kv_shapes = self._check(prompt, expected, choices, config.num_hidden_layers)

    def kv_cache_shapes(self, num_blocks: int, block_size: int) -> KVCacheShapes:
        """The shapes of each layer's key and value cache."""
        return [((num_blocks, block_size, *k), (num_blocks, block_size, *v)) for k, v in self._kv_shapes]

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, meta: AttentionMetadata, kv_caches: KVCaches) -> Tensor:
        """The final hidden states [T, hidden] of token_ids [T] int64; keys and values go into the caches."""
        return self._run(token_ids, ForwardContext(meta, kv_caches))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The scores [n, vocab] float32 of the token that follows each row of `hidden` [n, hidden]."""
        self._given.hidden_states = hidden[None]
        return self._head(use_cache=False).logits[0].float()

    def _run(self, token_ids: Tensor, step: ForwardContext) -> Tensor:
        with forward_context(step):
            output = self._body(
                input_ids=token_ids[None], position_ids=step.meta.positions[None], use_cache=False
            )
        return output.last_hidden_state[0]

    @torch.inference_mode()
    def _check(
        self, prompt: Tensor, expected: Tensor, choices: RecordRouting, num_layers: int
    ) -> list[tuple[torch.Size, torch.Size]]:
        """Computes `prompt` [T] over scattered blocks and compares with the logits `expected` [T, vocab],
        where a mixture of experts made `choices`.

        In two steps: the first half; the rest, together with the beginning as another sequence.

        Returns each layer's shapes [kv_heads, head_dim] of keys and of values. Raises ModelError.
        """
        length, first = len(prompt), (len(prompt) + 1) // 2
        beginning, table, other_table = min(length, PROBE_BLOCK_SIZE), [4, 1, 3], [5]

        def metadata(
            query_lens: list[int], context_lens: list[int], tables: list[list[int]]
        ) -> AttentionMetadata:
            return AttentionMetadata.build(query_lens, context_lens, tables, PROBE_BLOCK_SIZE, self.device)

        probe = ProbeContext(metadata([first], [first], [table]))
        positions = torch.arange(length, device=self.device)
        positions_second = torch.cat((positions[:beginning], positions[first:]))
        try:
            with ReplayRouting(choices, positions[:first]):
                logits_first = self.logits(self._run(prompt[:first], probe))
            if len(probe.kv_caches) < num_layers:
                raise ModelError(f"layer {len(probe.kv_caches)} keeps a state other than keys and values")
            step = ForwardContext(
                metadata([beginning, length - first], [beginning, length], [other_table, table]),
                probe.kv_caches,
            )
            with ReplayRouting(choices, positions_second):
                logits_second = self.logits(self._run(prompt[positions_second], step))
        except ModelError:
            raise
        except Exception as error:
            # The modules of some models cannot take our attention or our mask, each in its own way.
            raise ModelError(f"its modules do not run with paged attention: {error!r}") from error
        found = torch.cat((logits_first, logits_second))
        _compare(found, torch.cat((expected[:first], expected[positions_second])), self.dtype)
        return [(cache.keys.shape[2:], cache.values.shape[2:]) for cache in probe.kv_caches]


def _use_paged_attention(model: PreTrainedModel) -> None:
    """Raises ModelError if the model has its attention in no place where ours could be put."""
    if model.config.model_type == "falcon":
        use_paged_falcon_attention(model)
        return
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ModelError(f"{type(model).__name__} does not use transformers' attention interface")


class _GivenHiddenStates(nn.Module):
    """Stands where a model's body was, so that the model computes only its head, whatever that does."""

    hidden_states: Tensor

    def forward(self, *_: object, **__: object) -> _BodyOutput:
        return _BodyOutput(self.hidden_states)


class _BodyOutput:
    """What a model's body returns, whatever its class: hidden states, and nothing of all that is optional."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _take_apart(model: PreTrainedModel) -> tuple[nn.Module, _GivenHiddenStates, nn.Module]:
    """The body (embedding to final norm), what stands in its place, and the rest of the model around that."""
    body = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is body)
    if not name:
        raise ModelError(f"{type(model).__name__} has no body apart from its head")
    given = _GivenHiddenStates()
    model.set_submodule(name, given)
    return body, given, model


def _random_prompt(vocab_size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (_PROMPT_LENGTH,), generator=generator).to(device)


def _compare(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    found, expected = found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= _TOLERANCES[dtype]:
        raise ModelError(
            f"its logits with paged attention differ from its own by {difference:.2g} (relative norm; "
            f"at most {_TOLERANCES[dtype]:g} in {dtype}): it needs something that paged attention has not"
        )


def load_transformers_model(
    path: Path,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    max_model_len: int,
    state_dict: Mapping[str, Tensor] | None = None,
) -> TransformersModel:
    """Loads a model: of a Hugging Face directory, or of the tensors `state_dict` that a file has.

    `dtype` None: the checkpoint's own.

    Raises ModelError if transformers cannot load it, or if it cannot be served through paged attention.
    """
    if config.is_encoder_decoder:
        raise ModelError(f"{path}: an encoder-decoder ({config.model_type}) is not a causal language model")
    max_position = resolve_max_model_len(path, context_length(path), max_model_len)
    if state_dict is None:
        for file in weight_files(path):
            open_safetensors(file, "numpy")
    # The keyword changes the return type, which its annotation does not tell.
    loader: Any = AutoModelForCausalLM if state_dict is None else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        model, report = loader.from_pretrained(
            path if state_dict is None else None,
            config=config,
            state_dict=state_dict,
            dtype=dtype or "auto",
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"{path}: transformers cannot load it: {error}") from error
    if model.dtype not in _TOLERANCES:
        raise ModelError(f"{path}: its dtype is {model.dtype}; name one to serve it in")
    if report["missing_keys"]:
        raise ModelError(f"{path}: missing tensors: {', '.join(sorted(report['missing_keys'])[:8])}")
    try:
        return TransformersModel(model.to(device).eval(), max_position)
    except ModelError as error:
        raise ModelError(f"{path}: {config.model_type} cannot be served: {error}") from error
