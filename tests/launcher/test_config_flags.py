"""The flags of `fastserve serve` are the fields of `Config`."""

from __future__ import annotations

import argparse
import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import Config, ConfigError, TenantQuota
from fastserve.config_flags import add_config_flags, config_from, flag


def parsed(*words: str) -> Config:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return config_from(parser.parse_args(words))


def test_no_flag_gives_the_defaults() -> None:
    assert parsed() == Config()


def test_every_field_has_its_flag_with_a_description() -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    helps = {option: action.help for action in parser._actions for option in action.option_strings}
    for name in Config.__struct_fields__:
        assert not (helps[flag(name)] or "").startswith(" "), f"{name} has no description"


def test_each_kind_of_flag() -> None:
    config = parsed("--policy", "fcfs", "--max-num-seqs", "7", "--beta", "0.5", "--no-enable-prefix-caching")
    assert (config.policy, config.max_num_seqs, config.beta) == ("fcfs", 7, 0.5)
    assert config.enable_prefix_caching is False


@given(st.integers(min_value=1, max_value=4096), st.floats(min_value=0.0, max_value=1e6))
def test_numbers_come_through_unchanged(max_num_seqs: int, alpha: float) -> None:
    config = parsed(
        "--max-num-seqs", str(max_num_seqs), "--max-num-batched-tokens", "4096", "--alpha", repr(alpha)
    )
    assert (config.max_num_seqs, config.alpha) == (max_num_seqs, alpha)


def test_fields_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens.*allowed: at least `max_num_seqs`, 1024"):
        parsed("--max-num-seqs", "1024", "--max-num-batched-tokens", "512")


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--max-num-seqs", "0"], "--max-num-seqs: got 0"), (["--device", "tpu"], "--device: got 'tpu'")],
)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_flag(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parsed("--beta", "2", *words)


def test_a_choice_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--dtype", "random")
    assert "--dtype" in capsys.readouterr().err


def test_the_config_survives_the_file_between_launcher_and_models() -> None:
    config = parsed("--alpha", "3", "--model", "x.gguf")
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config


def test_a_range_of_priorities() -> None:
    assert parsed("--priority-range=-5,7").priority_range == (-5, 7)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("-5", "--priority-range: got (-5,): Expected `array` of length 2"),
        ("1,5", "`priority_range`: got 1,5; allowed: LOW,HIGH with LOW at most 0 and HIGH at least 0"),
        ("5,-5", "`priority_range`: got 5,-5; allowed: LOW,HIGH"),
        (f"0,{2**31}", "--priority-range: got (0, 2147483648): Expected `int` <= 2147483647"),
    ],
)
def test_a_range_that_cannot_be_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parsed(f"--priority-range={text}")


def test_quotas() -> None:
    quotas = parsed("--tenant-quotas", '{"*": {"requests_per_second": 2, "burst_seconds": 1}}').tenant_quotas
    assert quotas == {"*": TenantQuota(requests_per_second=2.0, burst_seconds=1.0)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": {}}', "got no limit; allowed: at least one of requests_per_second, tokens_per_second"),
        ('{"a": {"burst_seconds": 5}}', "got no limit"),
        (
            '{"a": {"requests_per_second": 0}}',
            "Expected `float` >= 1e-06 at `$.tenant_quotas[...].requests_per_sec",
        ),
        ('{"a": {"tokens_per_second": Infinity}}', "`$.tenant_quotas[...].tokens_per_second`"),
        ('{"a": {"tokens_in_flight": 1.5}}', "got `float` at `$.tenant_quotas[...].tokens_in_flight`"),
        ('{"a": {"rps": 1}}', "unknown field `rps`"),
        ('{"a": 3}', "Expected `object`, got `int`"),
        ("[]", "Expected `object`, got `array`"),
        (json.dumps({"x" * 129: {"tokens_in_flight": 1}}), "of length <= 128"),
    ],
)
def test_quotas_that_cannot_be_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        parsed("--tenant-quotas", text)
    assert str(caught.value).startswith("--tenant-quotas: got ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["--tenant-quotas", "{"], "got '{'; allowed: JSON"), (["--priority-range=a,b"], "allowed: LOW,HIGH")],
)
def test_what_is_no_value_of_its_kind_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)
    assert sentence in capsys.readouterr().err
