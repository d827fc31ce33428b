"""The tensors of the API, each declared here only.

`model_configs` writes the `config.pbtxt` files of the models that have them from these tables.
"""

from __future__ import annotations

from typing import NamedTuple


class TensorSpec(NamedTuple):
    """The type of a tensor, by Triton server's name, and its length; -1: any."""

    data_type: str
    length: int = 1


API_INPUTS = {
    "text_input": TensorSpec("TYPE_STRING"),
    "messages": TensorSpec("TYPE_STRING"),
    "prompt_token_ids": TensorSpec("TYPE_INT64", -1),
    "stream": TensorSpec("TYPE_BOOL"),
    "sampling_parameters": TensorSpec("TYPE_STRING"),
    "exclude_input_in_output": TensorSpec("TYPE_BOOL"),
    "return_finish_reason": TensorSpec("TYPE_BOOL"),
    "return_cumulative_logprob": TensorSpec("TYPE_BOOL"),
    "return_logprobs": TensorSpec("TYPE_BOOL"),
    "return_token_ids": TensorSpec("TYPE_BOOL"),
    "return_num_input_tokens": TensorSpec("TYPE_BOOL"),
    "return_num_output_tokens": TensorSpec("TYPE_BOOL"),
    "return_timing": TensorSpec("TYPE_BOOL"),
    "priority": TensorSpec("TYPE_INT32"),
    "tenant": TensorSpec("TYPE_STRING"),
    "expected_output_tokens": TensorSpec("TYPE_INT32"),
}
"""All are optional."""

API_OUTPUTS = {
    "text_output": TensorSpec("TYPE_STRING", -1),
    "finish_reason": TensorSpec("TYPE_STRING", -1),
    "cumulative_logprob": TensorSpec("TYPE_FP32", -1),
    "logprobs": TensorSpec("TYPE_STRING", -1),
    "prompt_logprobs": TensorSpec("TYPE_STRING"),
    "token_ids": TensorSpec("TYPE_INT64", -1),
    "num_input_tokens": TensorSpec("TYPE_UINT32"),
    "num_output_tokens": TensorSpec("TYPE_UINT32", -1),
    "timing": TensorSpec("TYPE_STRING"),
}
"""A response has `text_output`, and those of the others that the client asked for."""
