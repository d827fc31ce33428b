"""What a client sent, as Python values: the input tensors and the request parameters."""

from __future__ import annotations

import json
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.errors import invalid

PROMPTS = ("text_input", "messages", "prompt_token_ids")
OPTIONS = (
    "stream",
    "sampling_parameters",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_token_ids",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "priority",
    "tenant",
)
NAMES = PROMPTS + OPTIONS


def read_inputs(request: Any) -> dict[str, Any]:
    """The inputs that came, by name. Raises RequestError for a tensor that does not hold one element."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in NAMES}
    return {name: _value(name, tensor.as_numpy()) for name, tensor in tensors.items() if tensor is not None}


def _value(name: str, array: Any) -> Any:
    if name == "prompt_token_ids":
        return array
    if array.size != 1:
        raise invalid(name, list(array.shape), "a tensor of shape [1]")
    return array.reshape(-1)[0] if array.dtype == object else array.reshape(-1)[0].item()


def read_parameters(request: Any) -> dict[str, Any]:
    """The request parameters, without those that Triton server adds of its own."""
    parameters = json.loads(request.parameters() or "{}")
    return {name: value for name, value in parameters.items() if not name.startswith("triton_")}
