"""What a client sent, as Python values: the input tensors and the request parameters."""

from __future__ import annotations

import json
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.errors import invalid

API_INPUTS = {
    "text_input": "TYPE_STRING",
    "messages": "TYPE_STRING",
    "prompt_token_ids": "TYPE_INT64",
    "stream": "TYPE_BOOL",
    "sampling_parameters": "TYPE_STRING",
    "exclude_input_in_output": "TYPE_BOOL",
    "return_finish_reason": "TYPE_BOOL",
    "return_cumulative_logprob": "TYPE_BOOL",
    "return_logprobs": "TYPE_BOOL",
    "return_token_ids": "TYPE_BOOL",
    "return_num_input_tokens": "TYPE_BOOL",
    "return_num_output_tokens": "TYPE_BOOL",
    "priority": "TYPE_INT32",
    "tenant": "TYPE_STRING",
}
"""Every input of the API and its type, all optional, of shape [1] but for those in MANY.

`config.pbtxt` of `preprocess`, `fastserve` and `fastserve_infer` say the same, as a test holds.
"""
MANY = ("prompt_token_ids",)


def read_inputs(request: Any) -> dict[str, Any]:
    """The inputs that came, by name. Raises RequestError for a tensor that does not hold one element."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in API_INPUTS}
    return {name: _value(name, tensor.as_numpy()) for name, tensor in tensors.items() if tensor is not None}


def _value(name: str, array: Any) -> Any:
    if name in MANY:
        return array
    if array.size != 1:
        raise invalid(name, list(array.shape), "a tensor of shape [1]")
    return array.reshape(-1)[0] if array.dtype == object else array.reshape(-1)[0].item()


def read_parameters(request: Any) -> dict[str, Any]:
    """The request parameters, without those that Triton server adds of its own."""
    parameters = json.loads(request.parameters() or "{}")
    return {name: value for name, value in parameters.items() if not name.startswith("triton_")}
