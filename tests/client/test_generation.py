"""What comes back, in pieces and joined."""

from __future__ import annotations

import json
from typing import Any

from fastserve_client.generation import Logprob, chunk_of, join


def response(text: str, reason: str, token_ids: list[int], **others: list[Any]) -> dict[str, list[Any]]:
    return {
        "text_output": [text],
        "finish_reason": [reason],
        "token_ids": token_ids,
        "num_input_tokens": [4],
        "num_output_tokens": [len(token_ids)],
        **others,
    }


def test_chunks_join_to_the_whole() -> None:
    chunks = [chunk_of(response("a", "None", [1, 2])), chunk_of(response("", "None", []))]
    whole = join([*chunks, chunk_of(response("b", "stop", [3], cumulative_logprob=[-1.5]))])
    assert (whole.text, whole.finish_reason, whole.token_ids) == ("ab", "stop", [1, 2, 3])
    assert (whole.num_input_tokens, whole.num_output_tokens, whole.cumulative_logprob) == (4, 3, -1.5)
    assert whole.logprobs is None


def test_token_ids_go_to_their_sequences() -> None:
    outputs = response("a", "None", [1, 2, 3]) | {
        "text_output": ["a", "b", "c"],
        "finish_reason": ["None", "stop", "length"],
        "num_output_tokens": [2, 0, 1],
    }
    chunk = chunk_of(outputs)
    assert [completion.token_ids for completion in chunk.completions] == [[1, 2], [], [3]]
    assert [completion.finish_reason for completion in chunk.completions] == [None, "stop", "length"]


def test_logprobs_are_typed() -> None:
    tokens = [{"7": {"logprob": -0.5, "rank": 1, "decoded_token": " x"}}]
    chunk = chunk_of(response(" x", "stop", [7], logprobs=[json.dumps(tokens)]))
    assert chunk.logprobs == [{7: Logprob(-0.5, 1, " x")}]


def test_prompt_logprobs_come_once_and_the_first_token_has_none() -> None:
    tokens = [None, {"7": {"logprob": -0.5, "rank": 1, "decoded_token": " x"}}]
    first = chunk_of(response("a", "None", [7], prompt_logprobs=[json.dumps(tokens)]))
    whole = join([first, chunk_of(response("b", "stop", [8]))])
    assert whole.prompt_logprobs == [{}, {7: Logprob(-0.5, 1, " x")}]
