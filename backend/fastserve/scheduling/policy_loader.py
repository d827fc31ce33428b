"""The policy that the settings name.

One of one's own needs no change here: `--policy FILE.py:NAME` loads it (`examples/custom_policy.py`).
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
from fastserve.scheduling.policies import FCFS, Policy, PriorityAge

LOWEST_PRIORITY, HIGHEST_PRIORITY = -(2**31), 2**31 - 1
"""A request's priority is an INT32."""

POLICIES: dict[str, Callable[[Config], Policy]] = {
    "priority_age": lambda config: PriorityAge(config.alpha, config.beta),
    "fcfs": lambda config: FCFS(),
}
"""The policies that have a name of their own: what makes each from the settings."""


def make_policy(config: Config) -> Policy:
    """The policy that `config.policy` names: one of `POLICIES`, or what NAME of `FILE.py:NAME` makes of them.

    Raises ConfigError if there is no such policy, or if it has no finite key for some priority: the queues
    could not order by it.
    """
    policy = _factory(config.policy)(config)
    for priority in (LOWEST_PRIORITY, 0, HIGHEST_PRIORITY):
        try:
            key = policy.key(priority, 0.0)
            reason = "" if math.isfinite(key) else f"it is {key}"
        except (AttributeError, TypeError, ArithmeticError) as error:
            reason = str(error)
        if reason:
            raise ConfigError(
                f"policy: got {config.policy!r}, whose {type(policy).__name__} gives no finite number as "
                f"`key({priority}, 0.0)`: {reason}"
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
