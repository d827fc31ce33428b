"""The policies that can be simulated: the server's, and two to measure them by."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from fastserve.config import Config
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.policies.registry import POLICIES, make_policy
from fastserve.scheduling.policies.srpt import SRPT
from fastserve.scheduling.policies.strict_priority import StrictPriority

SIMULATED_ONLY: dict[str, Callable[[], Policy]] = {"srpt": SRPT, "strict_priority": StrictPriority}
CLAIRVOYANT = ("srpt",)
"""Those that are told the lengths of answers beforehand."""
NAMES = (*POLICIES, *SIMULATED_ONLY)


def policy_factory(name: str, config: Config) -> Callable[[], Policy]:
    """What makes the policy of that name, or that `FILE.py:NAME` names, from the settings.

    Raises ConfigError if there is none.
    """
    if name in SIMULATED_ONLY:
        return SIMULATED_ONLY[name]
    settings = replace(config, policy=name)
    make_policy(settings)
    return lambda: make_policy(settings)
