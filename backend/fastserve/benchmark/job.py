"""The requests of a benchmark as targets take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastserve.workload.arrival import Arrival
from fastserve.workload.lengths import CHAT_OUTPUTS, CHAT_PROMPTS, LogNormalLengths
from fastserve.workload.prompts import prompt_token_ids


@dataclass(frozen=True)
class Job:
    """One request: a prompt, and how many tokens to generate whatever they are."""

    prompt_token_ids: list[int]
    max_tokens: int
    priority: int = 0
    tenant: str = ""


def job_of(arrival: Arrival, number: int, seed: int) -> Job:
    """The job of a workload's arrival `number`."""
    prompt = prompt_token_ids(arrival, number, seed)
    return Job(prompt, arrival.num_output_tokens, arrival.priority, arrival.tenant)


def random_jobs(
    count: int,
    seed: int,
    prompts: LogNormalLengths = CHAT_PROMPTS,
    outputs: LogNormalLengths = CHAT_OUTPUTS,
    first_number: int = 0,
    num_prefix_tokens: int = 0,
) -> list[Job]:
    """Jobs of these lengths, without common prefixes; unless told otherwise as long as chats.

    Those of one seed and another `first_number` have the same lengths and other tokens, if `count` or more
    lie between. `num_prefix_tokens`: put before each prompt, the same of all.
    """
    random = np.random.default_rng(seed)
    lengths = zip(prompts.draw(count, random).tolist(), outputs.draw(count, random).tolist(), strict=True)
    jobs = [job_of(Arrival(0.0, *each), number, seed) for number, each in enumerate(lengths, first_number)]
    if not num_prefix_tokens:
        return jobs
    shared = Arrival(0.0, num_prefix_tokens, 1, block_hashes=(0,), block_size=num_prefix_tokens)
    prefix = prompt_token_ids(shared, 0, seed)
    return [Job(prefix + job.prompt_token_ids, job.max_tokens) for job in jobs]
