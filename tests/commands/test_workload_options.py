"""Options that describe a workload."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest

from fastserve.commands.workload_options import (
    add_arrival_arguments,
    add_length_arguments,
    arrivals_of,
    described,
    has_arrivals,
)
from fastserve.config import ConfigError
from fastserve.workload.arrival import Arrival
from fastserve.workload.transformations import mean_rate


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Four requests, one a second."""
    path = tmp_path / "small.csv"
    rows = [f"2023-11-16 18:17:0{second}.0,{100 * second},{10 * second}" for second in range(1, 5)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    return path


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_length_arguments(parser)
    add_arrival_arguments(parser.add_argument_group())
    return parser.parse_args(list(map(str, words)))


def arrivals(*words: object) -> list[Arrival]:
    return arrivals_of(parse(*words))


def test_a_trace_comes_as_it_is(trace: Path) -> None:
    assert arrivals("--trace", trace) == [Arrival(n - 1.0, 100 * n, 10 * n) for n in range(1, 5)]


@pytest.mark.parametrize(
    ("words", "times"),
    [
        (["--requests", 2], [0, 1]),
        (["--rate", 4], [0, 0.25, 0.5, 0.75]),
        (["--speed", 2], [0, 0.5, 1, 1.5]),
        (["--load", 1.25, "--load-of", 4], [0, 0.2, 0.4, 0.6]),
    ],
)
def test_a_trace_is_cut_and_stretched(words: list[object], times: list[float], trace: Path) -> None:
    assert [a.time for a in arrivals("--trace", trace, *words)] == pytest.approx(times)


def test_lengths_are_scaled_and_then_cut(trace: Path) -> None:
    words = ["--length-scale", 0.5, "--max-prompt-tokens", 120, "--max-output-tokens", 12]
    lengths = [(a.num_prompt_tokens, a.num_output_tokens) for a in arrivals("--trace", trace, *words)]
    assert lengths == [(50, 5), (100, 10), (120, 12), (120, 12)]


def test_priorities_and_tenants_are_drawn_from_shares() -> None:
    drawn = arrivals("--poisson", 1, "--requests", 500, "--priorities", "10:1,-3:9", "--tenants", "a:1,b:1")
    assert {a.priority for a in drawn} == {10, -3}
    assert 20 < sum(a.priority == 10 for a in drawn) < 90
    assert {a.tenant for a in drawn} == {"a", "b"}


@pytest.mark.parametrize("source", [["--poisson", 5], ["--gamma", "5,3"]])
def test_synthetic_arrivals_have_their_rate_and_lengths(source: list[object]) -> None:
    drawn = arrivals(*source, "--requests", 3000, "--prompt-tokens", "225,1.2,1,1024", "--output-tokens", 7)
    assert mean_rate(drawn) == pytest.approx(5, rel=0.2)
    assert {a.num_output_tokens for a in drawn} == {7}
    assert max(a.num_prompt_tokens for a in drawn) == 1024


def test_synthetic_arrivals_are_chats_unless_told_otherwise() -> None:
    drawn = arrivals("--poisson", 5)
    assert len(drawn) == 64
    assert all(16 <= a.num_prompt_tokens <= 512 and 8 <= a.num_output_tokens <= 256 for a in drawn)


def test_the_options_that_were_given_are_described(trace: Path) -> None:
    arguments = parse("--trace", trace, "--rate", 2, "--priorities", "1:1")
    assert has_arrivals(arguments)
    assert msgspec.json.decode(msgspec.json.encode(described(arguments))) == {
        "seed": 0,
        "trace": "small.csv",
        "rate": 2.0,
        "priorities": {"1": 1.0},
    }
    assert not has_arrivals(parse())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--poisson", 1, "--rate", 2], "--rate: only with --trace"),
        (["--poisson", 1, "--load-of", 2], "--load-of: only with --trace"),
        (["--trace", "TRACE", "--prompt-tokens", 2], "--prompt-tokens: not with --trace"),
        (["--trace", "TRACE", "--load", 2], "--load, --load-of: only together"),
        (["--trace", "TRACE", "--speed", 0], "`speed`: got 0"),
        (["--trace", "TRACE", "--requests", 0], "--requests: got 0; allowed: at least 1"),
        (["--trace", "TRACE", "--seed", -1], "--seed: got -1; allowed: at least 0"),
        (["--trace", "TRACE", "--priorities", "1:-1"], "shares"),
        (["--trace", "TRACE", "--requests", 1, "--rate", 1], "no rate"),
        (["--poisson", 0], "`rate`: got 0"),
        (["--gamma", "1,-1"], "`cv`: got -1"),
    ],
)
def test_what_cannot_be_or_would_not_be_read_is_refused(
    words: list[object], sentence: str, trace: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        arrivals(*(trace if word == "TRACE" else word for word in words))


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["--gamma", "1"], "RATE,CV"),
        (["--gamma", "1,x"], "RATE,CV"),
        (["--priorities", "high:1"], "VALUE:SHARE"),
        (["--tenants", "a"], "VALUE:SHARE"),
        (["--prompt-tokens", "0"], "MEAN,SIGMA"),
        (["--prompt-tokens", "1,2,3"], "MEAN,SIGMA"),
        (["--poisson", "1", "--gamma", "1,1"], "not allowed with"),
        (["--rate", "1", "--speed", "1"], "not allowed with"),
    ],
)
def test_a_value_that_cannot_be_read_is_refused_with_its_form(words: list[str], allowed: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=allowed):
        parse(*words)
