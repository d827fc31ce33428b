"""Streams say the same as whole answers, in whole characters, and never more than a stop string allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_client import Client

from .conftest import fuzzing

SMALL, FULL = 25, 200

prompts = st.one_of(
    st.text(min_size=1, max_size=60).filter(lambda text: text.isprintable()),
    st.sampled_from(
        [
            "写一首关于春天的诗：",
            "Repeat these emoji exactly: 🎉🚀👩‍👩‍👧‍👦🇫🇷 ->",
            "Übersetze ins Japanische: Guten Morgen.",
            "Count: one, two, three,",
            "اكتب جملة قصيرة:",
        ]
    ),
)
stops = st.lists(
    st.one_of(
        st.sampled_from([" the", "\n", "e", ". ", "。", "的", "an", "🎉", "ing "]),
        st.text(min_size=1, max_size=3),
    ),
    max_size=3,
)
samplings = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 48),
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.8]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "top_k": st.sampled_from([0, 5, 50]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "seed": st.integers(0, 2**31),
        "stop": stops,
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "ignore_eos": st.booleans(),
    }
)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


def test_joined_deltas_equal_the_whole_text(client: Client, soak: bool) -> None:
    @fuzzing(FULL if soak else SMALL)
    @given(prompt=prompts, sampling=samplings)
    def check(prompt: str, sampling: dict[str, Any]) -> None:
        whole = client.generate(prompt, **sampling)
        chunks = list(client.stream(prompt, **sampling))
        joined = "".join(chunk.text for chunk in chunks)
        assert joined == whole.text
        assert sum(chunk.num_output_tokens for chunk in chunks) == whole.num_output_tokens
        check_stops(joined, sampling)

    check()


def check_stops(text: str, sampling: dict[str, Any]) -> None:
    """The text ends with the stop string that was completed first, or just before it."""
    shown = text[:-1] if sampling["include_stop_str_in_output"] else text
    assert not any(stop in shown for stop in sampling["stop"])


def test_a_stop_string_ends_the_computation(server: Any, client: Client) -> None:
    before = server.metrics()['fastserve_generation_tokens_total{tenant=""}']
    answer = client.generate("1, 2, 3, 4,", temperature=0, max_tokens=3000, stop=["9"], ignore_eos=True)
    assert answer.finish_reason == "stop"
    assert "9" not in answer.text
    server.wait_until_idle(2)
    computed = server.metrics()['fastserve_generation_tokens_total{tenant=""}'] - before
    assert computed < 300


def test_text_that_repeats_takes_fewer_steps_than_tokens(server: Any, client: Client) -> None:
    """By prompt lookup; a stop string within what a step brings ends it."""
    before = server.metrics().get("fastserve_spec_decode_accepted_tokens_total", 0.0)
    prompt = "red, orange, yellow, green, blue, indigo, violet; " * 8
    answer = client.generate(prompt, temperature=0, max_tokens=100, ignore_eos=True)
    assert answer.num_output_tokens == 100
    server.wait_for_metrics(
        lambda metrics: metrics.get("fastserve_spec_decode_accepted_tokens_total", 0.0) > before, 2
    )
    word = answer.text.split()[12]
    stopped = client.generate(prompt, temperature=0, max_tokens=100, ignore_eos=True, stop=[word])
    assert stopped.text == answer.text[: answer.text.index(word)]


def test_seeded_text_is_the_same_alone_and_in_a_batch(client: Client) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 1234, "max_tokens": 48, "ignore_eos": True}
    alone = client.generate("Once upon a time", **sampling).text
    others = [
        client.stream(f"Tell me about the number {i}:", temperature=1.0, max_tokens=64) for i in range(15)
    ]
    together = client.generate("Once upon a time", **sampling).text
    for stream in others:
        stream.read()
    assert together == alone
