from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import Config, ConfigError
from fastserve.scheduling.policies import FCFS, PriorityAge
from fastserve.scheduling.policy_loader import make_policy

weights = st.floats(0.001, 1000.0)
priorities = st.integers(-1000, 1000)
moments = st.floats(0.0, 1e6)


@given(weights, weights, priorities, priorities, moments, st.floats(0.0, 1e6))
def test_a_request_is_overtaken_only_by_those_that_came_within_the_bound(
    alpha: float, beta: float, priority: int, other: int, arrival: float, later: float
) -> None:
    policy = PriorityAge(alpha, beta)
    gap = other - priority
    overtakes = policy.key(other, arrival + later) > policy.key(priority, arrival)
    rounding = 1e-9 * (alpha * 1000 + beta * 2e6) / beta
    if overtakes:
        assert later <= alpha * gap / beta + rounding
    elif later < alpha * gap / beta - rounding:
        raise AssertionError("a more urgent request within the bound should go first")


@given(weights, weights, priorities, priorities, moments, moments, st.floats(0.0, 1e6))
def test_the_key_orders_requests_as_their_scores_do_at_any_moment(
    alpha: float, beta: float, priority: int, other: int, arrival: float, other_arrival: float, waited: float
) -> None:
    policy = PriorityAge(alpha, beta)
    now = max(arrival, other_arrival) + waited
    score_gap = alpha * (priority - other) + beta * ((now - arrival) - (now - other_arrival))
    key_gap = policy.key(priority, arrival) - policy.key(other, other_arrival)
    assert abs(score_gap - key_gap) <= 1e-9 * (alpha * 2000 + beta * 4e6)


def test_fcfs_ignores_priority() -> None:
    assert FCFS().key(0, 1.0) > FCFS().key(100, 2.0)


def test_settings_choose_the_policy() -> None:
    assert make_policy(Config(policy="fcfs")) == FCFS()
    assert make_policy(Config(policy="priority_age", alpha=3.0, beta=0.5)) == PriorityAge(3.0, 0.5)


def own_policy(directory: Path, source: str) -> Config:
    (directory / "mine.py").write_text(source)
    return Config(policy=f"{directory}/mine.py:make", alpha=3.0, beta=0.5)


def test_a_policy_of_ones_own_is_loaded_from_its_file_and_told_the_settings(tmp_path: Path) -> None:
    source = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class make:
    config: object

    def key(self, priority: int, arrival: float) -> float:
        return self.config.alpha * priority - 2 * arrival
"""
    assert make_policy(own_policy(tmp_path, source)).key(2, 1.5) == 3.0


def test_a_file_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Config(policy="mine.py:make").policy == f"{tmp_path}/mine.py:make"


@pytest.mark.parametrize("name", ["random", ""])
def test_a_policy_of_no_known_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"got '{name}'; allowed: priority_age, fcfs, or FILE.py:NAME"):
        make_policy(Config(policy=name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_file.py:make", "cannot be loaded: FileNotFoundError"),
        ("notes.txt:make", "is no Python file"),
        ("broken.py:make", "cannot be loaded: SyntaxError"),
        ("failing.py:make", "cannot be loaded: ZeroDivisionError"),
        ("failing.py:make:make", "is no Python file"),
        ("good.py:make", "has no class or function 'make'"),
        ("good.py:number", "has no class or function 'number'"),
        ("good.py:", "has no class or function ''"),
        ("good.py:keyless", r"SimpleNamespace gives no finite number as `key.*no attribute 'key'"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make(")
    (tmp_path / "failing.py").write_text("1 / 0")
    (tmp_path / "good.py").write_text(
        "import types\nnumber = 3\ndef keyless(config): return types.SimpleNamespace()"
    )
    with pytest.raises(ConfigError, match=f"policy: got '{tmp_path}/{name}'.*{reason}"):
        make_policy(Config(policy=f"{tmp_path}/{name}"))


@pytest.mark.parametrize("key", ["float('nan')", "float('inf')", "None", "'1'", "2.0 ** priority"])
def test_a_policy_whose_keys_cannot_be_ordered_is_refused(key: str, tmp_path: Path) -> None:
    source = f"""
class make:
    def __init__(self, config): pass
    def key(self, priority, arrival): return {key} if priority > 0 else 0.0
"""
    with pytest.raises(ConfigError, match=r"make gives no finite number as `key\(2147483647, 0.0\)`"):
        make_policy(own_policy(tmp_path, source))
