"""The policies by name. One of one's own needs no change here: `--policy FILE.py:NAME` loads it.

`examples/custom_policy.py` is one.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fastserve.config import Config, ConfigError
from fastserve.scheduling.policies.fair import Fair
from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.scheduling.policies.hrrn import HRRN
from fastserve.scheduling.policies.mlfq import MLFQ
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.policies.priority_age import PriorityAge
from fastserve.types import RequestView

POLICIES: dict[str, Callable[[Config], Policy]] = {
    "priority_age": lambda config: PriorityAge(config.alpha, config.beta),
    "fcfs": lambda config: FCFS(),
    "mlfq": lambda config: MLFQ(starvation_seconds=config.starvation_seconds),
    "hrrn": lambda config: HRRN(),
    "fair": lambda config: Fair(config.tenant_weights, config.starvation_seconds),
}
"""The policies that have a name of their own: what makes each from the settings."""


def make_policy(config: Config) -> Policy:
    """The policy that `config.policy` names: one of `POLICIES`, or what NAME of `FILE.py:NAME` makes of them.

    Raises ConfigError if there is no such policy, or if it has no finite rank for some priority: the queues
    could not order by it.
    """
    policy = _factory(config.policy)(config)
    for priority in (config.priority_range[0], 0, config.priority_range[1]):
        view = RequestView("", 0, priority, 0.0, "", 1, 1, waiting_since=0.0, num_tokens=1)
        try:
            policy.on_enqueue(view, 0.0)
            rank = policy.rank(view, 0.0)
            is_rank = isinstance(rank, tuple) and all(map(math.isfinite, rank))
            reason = "" if is_rank else f"it is {rank!r}"
            policy.on_abandon(view)
        except (AttributeError, TypeError, ArithmeticError, NotImplementedError) as error:
            reason = repr(error)
        if reason:
            raise ConfigError(
                f"policy: got {config.policy!r}, whose {type(policy).__name__} gives no tuple of finite "
                f"numbers as the rank of a request of priority {priority}: {reason}"
            )
    return policy


def _factory(name: str) -> Callable[[Config], Any]:
    if name in POLICIES:
        return POLICIES[name]
    path, separator, attribute = name.rpartition(":")
    if not separator:
        raise ConfigError(f"policy: got {name!r}; allowed: {', '.join(POLICIES)}, or FILE.py:NAME")
    factory: Callable[[Config], Any] | None = getattr(_module(Path(path), name), attribute, None)
    if not callable(factory):
        raise ConfigError(f"policy: got {name!r}, but {path} has no class or function {attribute!r}")
    return factory


def _module(path: Path, name: str) -> ModuleType:
    """What is in the file, as a module that `import` does not know of."""
    spec = importlib.util.spec_from_file_location(f"fastserve_policy_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"policy: got {name!r}, but {path} is no Python file: its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the names in their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"policy: got {name!r}, which cannot be loaded: {error!r}") from error
    return module
