"""An open loop: requests are sent when they are due, whatever has become of those before them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from fastserve.benchmark.job import Job, job_of
from fastserve.benchmark.targets import Target
from fastserve.errors import RequestError
from fastserve.workload.arrival import Arrival
from fastserve.workload.request_record import RequestRecord
from fastserve_client import FastServeError


def replay(
    target: Target, arrivals: Sequence[Arrival], seed: int, on_end: Callable[[], None] = lambda: None
) -> list[RequestRecord]:
    """Sends a workload to a target, a thread for each request in flight; its records in the same order.

    A request that is refused or fails is a record with its error. `on_end` is called at the end of each, from
    any thread. Raises what a target raises besides, and sends nothing after that.
    """
    return _Replay(target, arrivals, seed, on_end).run()


class _Replay:
    def __init__(
        self, target: Target, arrivals: Sequence[Arrival], seed: int, on_end: Callable[[], None]
    ) -> None:
        self._target = target
        self._arrivals = arrivals
        self._seed = seed
        self._on_end = on_end
        self._records: list[RequestRecord | None] = [None] * len(arrivals)
        self._failures: list[BaseException] = []
        self._has_failed = threading.Event()
        self._start = 0.0

    def run(self) -> list[RequestRecord]:
        """See `replay`."""
        threads = []
        self._start = time.perf_counter()
        for number, arrival in enumerate(self._arrivals):
            job = job_of(arrival, number, self._seed)  # before it is due, and not all at once: they are large
            if self._has_failed.wait(max(0.0, arrival.time - self._now())):
                break
            threads.append(threading.Thread(target=self._serve, args=(number, job), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]
        return [record for record in self._records if record is not None]

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _serve(self, number: int, job: Job) -> None:
        arrival = self._arrivals[number]
        sent = self._now()
        first_token, num_output_tokens, error = None, 0, None
        try:
            for new in self._target.stream(job):
                if first_token is None and new > 0:
                    first_token = self._now() - arrival.time
                num_output_tokens += new
        except (FastServeError, RequestError) as refusal:
            error = str(getattr(refusal.code, "value", refusal.code))
        except BaseException as failure:
            self._failures.append(failure)
            self._has_failed.set()
            return
        self._records[number] = RequestRecord(
            arrival=arrival.time,
            lateness=sent - arrival.time,
            first_token=first_token,
            completion=self._now() - arrival.time,
            num_prompt_tokens=arrival.num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            priority=arrival.priority,
            tenant=arrival.tenant,
            error=error,
        )
        self._on_end()
