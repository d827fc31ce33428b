"""`/tokenize`, `/detokenize` and the count of a chat's tokens, with a small real tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from tests.openai_api.conftest import MODEL, FakeClient

from fastserve.openai_api.app import create_app
from fastserve.openai_api.tool_formats import PROMPTED
from fastserve.text.prompt_tokenizer import PromptTokenizer
from fastserve.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return Tokenizer(tokenizer_directory)


@pytest.fixture
def tokens(fake: FakeClient, tokenizer: Tokenizer) -> Iterator[TestClient]:
    app = create_app(lambda: fake, MODEL, PROMPTED, tokenizer=PromptTokenizer(tokenizer))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_a_prompt_and_back(tokens: TestClient, tokenizer: Tokenizer) -> None:
    answer = tokens.post("/tokenize", json={"prompt": "Hello, world", "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode("Hello, world")
    assert answer["count"] == len(answer["tokens"])
    assert "".join(answer["token_strs"]) == "Hello, world"
    assert tokens.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Hello, world"}


def test_a_chat_as_the_model_gets_it(tokens: TestClient, tokenizer: Tokenizer) -> None:
    ids = tokens.post("/tokenize", json={"messages": CHAT, "model": MODEL}).json()["tokens"]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    shorter = tokens.post("/tokenize", json={"messages": CHAT, "add_generation_prompt": False}).json()
    assert shorter["count"] < len(ids)


def test_anthropics_count_is_that_of_the_chat(tokens: TestClient) -> None:
    body = {"model": MODEL, "system": "Be brief.", "messages": CHAT}
    counted = tokens.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert counted == tokens.post("/tokenize", json={"messages": messages}).json()["count"]
    tool = {"name": "f", "input_schema": {"type": "object"}}
    assert (
        tokens.post("/v1/messages/count_tokens", json=body | {"tools": [tool]}).json()["input_tokens"]
        > counted
    )


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/detokenize", {"tokens": [10**9]}, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(tokens: TestClient, path: str, body: dict[str, object], param: str) -> None:
    answer = tokens.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_without_a_tokenizer_both_are_refused(api: TestClient) -> None:
    assert api.post("/tokenize", json={"prompt": "a"}).status_code == 404
    assert api.post("/detokenize", json={"tokens": [1]}).status_code == 404
