"""Any other causal model of transformers: its own modules compute, our paged cache holds keys and values.

Not every model can work this way: some keep a state other than keys and values, some bring biases or masks of
their own. So a model is served only after a check at load: a short random prompt goes through transformers'
attention and through ours, in two ragged steps, and the logits must agree. That costs three forward passes of
two dozen tokens, little beside the loading of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastserve.checkpoints.kv_cache_scheme import KVCacheShapes
from fastserve.checkpoints.model_error import ModelError
from fastserve.models.attention_interface import (
    ATTENTION,
    PROBE_BLOCK_SIZE,
    ForwardContext,
    ProbeContext,
    forward_context,
)
from fastserve.models.expert_routing import RecordRouting, ReplayRouting
from fastserve.models.falcon_attention import use_paged_falcon_attention
from fastserve.models.kv_cache import KVCaches
from fastserve_kernels.attention_metadata import AttentionMetadata

_PROMPT_LENGTH = 2 * PROBE_BLOCK_SIZE + 5
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}
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
        reference = _reference_run(model, prompt)
        _use_paged_attention(model)
        self._body, self._hidden_states, self._head = _split_body_and_head(model)
        self._kv_shapes = self._check(reference, config.num_hidden_layers)

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
        self._hidden_states.value = hidden[None]
        return self._head(use_cache=False).logits[0].float()

    def _run(self, token_ids: Tensor, step: ForwardContext) -> Tensor:
        with forward_context(step):
            output = self._body(
                input_ids=token_ids[None], position_ids=step.meta.positions[None], use_cache=False
            )
        return output.last_hidden_state[0]

    @torch.inference_mode()
    def _check(self, reference: _ReferenceRun, num_layers: int) -> list[tuple[torch.Size, torch.Size]]:
        """Computes the prompt of a reference run over scattered blocks, and compares the logits.

        Returns each layer's shapes [kv_heads, head_dim] of keys and of values. Raises ModelError.
        """
        try:
            found, positions, probe = self._two_ragged_steps(reference, num_layers)
        except ModelError:
            raise
        except Exception as error:
            # The modules of some models cannot take our attention or our mask, each in its own way.
            raise ModelError(f"its modules do not run with paged attention: {error!r}") from error
        _compare(found, reference.logits[positions], self.dtype)
        return [(cache.keys.shape[2:], cache.values.shape[2:]) for cache in probe.kv_caches]

    def _two_ragged_steps(
        self, reference: _ReferenceRun, num_layers: int
    ) -> tuple[Tensor, Tensor, ProbeContext]:
        """The first half of the prompt; then the rest, together with the beginning as another sequence.

        Returns the logits [n, vocab], the positions [n] in the prompt that they belong to, and the first
        step's context with the caches that it found.
        """
        prompt, routing = reference.prompt, reference.routing
        length, first = len(prompt), (len(prompt) + 1) // 2
        beginning, table, other_table = min(length, PROBE_BLOCK_SIZE), [4, 1, 3], [5]
        positions = torch.arange(length, device=self.device)
        positions_second = torch.cat((positions[:beginning], positions[first:]))
        probe = ProbeContext(self._metadata([first], [first], [table]))
        with ReplayRouting(routing, positions[:first]):
            logits_first = self.logits(self._run(prompt[:first], probe))
        if len(probe.kv_caches) < num_layers:
            raise ModelError(f"layer {len(probe.kv_caches)} keeps a state other than keys and values")
        second = ForwardContext(
            self._metadata([beginning, length - first], [beginning, length], [other_table, table]),
            probe.kv_caches,
        )
        with ReplayRouting(routing, positions_second):
            logits_second = self.logits(self._run(prompt[positions_second], second))
        found = torch.cat((logits_first, logits_second))
        return found, torch.cat((positions[:first], positions_second)), probe

    def _metadata(
        self, query_lens: list[int], context_lens: list[int], block_tables: list[list[int]]
    ) -> AttentionMetadata:
        return AttentionMetadata.build(query_lens, context_lens, block_tables, PROBE_BLOCK_SIZE, self.device)


class _ReferenceRun(NamedTuple):
    """A prompt as transformers' own attention computes it."""

    prompt: Tensor
    """[T] int64."""
    logits: Tensor
    """[T, vocab] float32."""
    routing: RecordRouting
    """The experts that each token took, in a mixture of experts."""


def _reference_run(model: PreTrainedModel, prompt: Tensor) -> _ReferenceRun:
    routing = RecordRouting()
    with torch.inference_mode(), routing:
        logits = model(input_ids=prompt[None], use_cache=False).logits[0].float()
    return _ReferenceRun(prompt, logits, routing)


def _use_paged_attention(model: PreTrainedModel) -> None:
    """Raises ModelError if the model has its attention in no place where ours could be put."""
    if model.config.model_type == "falcon":
        use_paged_falcon_attention(model)
        return
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ModelError(f"{type(model).__name__} does not use transformers' attention interface")


class _HiddenStatesInput(nn.Module):
    """Stands where a model's body was and gives `value`, so that the model computes only its head."""

    value: Tensor
    """[1, n, hidden]."""

    def forward(self, *_: object, **__: object) -> _BodyOutput:
        return _BodyOutput(self.value)


class _BodyOutput:
    """What a model's body returns, whatever its class: hidden states, and nothing of all that is optional."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _split_body_and_head(model: PreTrainedModel) -> tuple[nn.Module, _HiddenStatesInput, nn.Module]:
    """The body (embedding to final norm), what stands in its place, and the rest of the model around that.

    Raises ModelError if the model is its own body.
    """
    body = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is body)
    if not name:
        raise ModelError(f"{type(model).__name__} has no body apart from its head")
    hidden_states = _HiddenStatesInput()
    model.set_submodule(name, hidden_states)
    return body, hidden_states, model


def _random_prompt(vocab_size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (_PROMPT_LENGTH,), generator=generator).to(device)


def _compare(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raises ModelError if logits [n, vocab] differ by more than rounding in `dtype`, whatever their mean."""
    found, expected = found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= TOLERANCES[dtype]:
        raise ModelError(
            f"its logits with paged attention differ from its own by {difference:.2g} (relative norm; "
            f"at most {TOLERANCES[dtype]:g} in {dtype}): it needs something that paged attention has not"
        )
