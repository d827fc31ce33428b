"""The flags of `fastserve serve` are the fields of `Config`."""

from __future__ import annotations

import argparse

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import Config, ConfigError
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
