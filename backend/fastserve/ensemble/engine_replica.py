"""One engine replica as the model `engine` keeps it: its worker, and what has been sent to that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.config import Config
from fastserve.engine.worker_pipe import FromWorker
from fastserve.ensemble.metrics import Counter
from fastserve.ensemble.worker_supervisor import WorkerSupervisor
from fastserve.scheduling.batch_report import BatchReport
from fastserve.scheduling.capacity import ReplicaCapacity
from fastserve.types import Add, Cancel, EngineStats, Forget, Ready, Resume


class EngineReplica:
    """Counts what arrives for its worker. Its owner's lock guards it."""

    def __init__(
        self,
        number: int,
        config: Config,
        files: ModelFiles,
        on_message: Callable[[int, FromWorker], None],
        on_death: Callable[[int, str, bool], None],
        on_health: Callable[[int, str, str | None], None],
        restarts: Counter,
    ) -> None:
        """What is called is given `number` first: see `WorkerSupervisor`."""
        self.stats: EngineStats | None = None
        """After the worker's last step; None while there is no worker that could serve."""
        self._incarnation = ""
        self._arrived = 0
        self._sent = 0
        """Releases that went to the present worker."""
        self.worker = WorkerSupervisor(
            config,
            files,
            number,
            partial(on_message, number),
            partial(on_death, number),
            partial(on_health, number),
            restarts,
        )

    @property
    def has_worker(self) -> bool:
        """Whether there is a worker that could serve."""
        return self.stats is not None

    def send(self, message: Add | Resume) -> None:
        """A request has been released to this replica, or a sequence that waits there may run again."""
        self._arrived += 1
        self._sent += 1
        self.worker.send(message)

    def count_dropped(self) -> None:
        """A release has come of which the worker is told nothing."""
        self._arrived += 1

    def cancel(self, cancel: Cancel) -> None:
        """Stops a request, or one sequence of it."""
        self.worker.send(cancel)

    def forget(self, uid: str) -> None:
        """Another replica goes on with a request that waits here, preempted."""
        self.worker.send(Forget(uid))

    def start_worker(self, ready: Ready) -> None:
        """A new worker is ready."""
        self._incarnation, self._sent, self.stats = ready.incarnation, 0, ready.stats

    @property
    def capacity(self) -> ReplicaCapacity:
        """What the worker could take, and which releases that accounts for."""
        stats, arrived = self.stats, self._arrived
        if stats is None:
            return ReplicaCapacity(self._incarnation, received=arrived, arrived=arrived)
        return ReplicaCapacity(
            incarnation=self._incarnation,
            received=arrived - (self._sent - stats.received),
            arrived=arrived,
            num_running=stats.running,
            num_blocks=stats.kv_blocks_total,
            **{name: getattr(stats, name) for name in BatchReport._fields},
        )
