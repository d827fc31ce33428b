"""A served encoder: a model of Triton server that its dynamic batcher gives batches of requests.

Three threads overlap: `execute` tokenizes a batch while the one before it is computed by the thread `compute`
and the answers of the one before that are sent by the thread `responses`. `execute` returns when its batch
begins to be computed, and not before: what comes meanwhile waits in the server's queue, where it is batched
and ranked by priority.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.access.request_log import open_request_log
from fastserve.config import is_stopping, read_config
from fastserve.encoders.served_encoder import SETTINGS_PARAMETER, EncoderSettings
from fastserve.ensemble.admitted_request import AdmittedRequest, admitted_request, encoder_record
from fastserve.ensemble.door import Door, TenantQuotas
from fastserve.ensemble.encoder_metrics import EncoderMetrics
from fastserve.ensemble.messaging import error_response, numbers, send_response_or_error
from fastserve.ensemble.server_death import leave_with_server
from fastserve.errors import ErrorCode, RequestError
from fastserve.openmp import limit_spinning
from fastserve.service_thread import ServiceThread

if TYPE_CHECKING:
    from torch import Tensor

    from fastserve.access.grant import Grant
    from fastserve.encoders.encoder import Encoder
    from fastserve.ensemble.encoder_request import EncoderRequest

logger = logging.getLogger(__name__)


class EncoderModel:
    """Triton server's Python model of an encoder, whatever its task."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the encoder, and starts the threads."""
        leave_with_server()
        model_config, settings = json.loads(args["model_config"]), read_config()
        self._model = args["model_name"]
        self._door = Door(settings, self._model)
        self._tenant_quotas = TenantQuotas(settings)
        self._quotas_lock = threading.Lock()
        self._request_log = open_request_log(settings)
        parameter = model_config["parameters"][SETTINGS_PARAMETER]["string_value"]
        self._encoder = _load(msgspec.json.decode(parameter.encode(), type=EncoderSettings))
        self._metrics = EncoderMetrics(self._model)
        self._idle = threading.Semaphore(1)
        """Held from when a batch goes to the thread `compute` until that has computed it."""
        self._to_compute: queue.SimpleQueue[list[EncoderRequest] | None] = queue.SimpleQueue()
        self._to_answer: queue.SimpleQueue[tuple[list[EncoderRequest], Tensor | Exception] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            ServiceThread("compute", self._compute_next),
            ServiceThread("responses", self._answer_next),
        ]
        for thread in self._threads:
            thread.start()

    def execute(self, requests: list[Any]) -> list[None]:
        """Reads and tokenizes a batch of requests; each is answered later, or refused now."""
        batch = [each for each in map(self._read, requests) if each is not None]
        if batch:
            self._idle.acquire()
            self._to_compute.put(batch)
        return [None] * len(requests)

    def _read(self, request: Any) -> EncoderRequest | None:
        from fastserve.ensemble.encoder_request import read_request

        sender = request.get_response_sender()
        try:
            if is_stopping():
                raise RequestError("the server is stopping and takes no more requests", ErrorCode.UNAVAILABLE)
            grant, parameters = self._door.read(request)
            each = read_request(self._encoder, request, parameters, sender)
            return replace(each, admitted=self._admit(each, request.request_id(), grant))
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("a request could not be read")
            self._refuse(sender, error)
            return None

    def _admit(self, each: EncoderRequest, request_id: str, grant: Grant | None) -> AdmittedRequest:
        """Charges a request to its tenant. Raises RequestError where that is over a quota."""
        admitted = admitted_request(request_id, each.num_tokens, grant)
        with self._quotas_lock:
            self._tenant_quotas.refresh()
            self._tenant_quotas.quotas.admit(admitted, admitted.arrival)
        return admitted

    def _refuse(self, sender: Any, error: Exception, admitted: AdmittedRequest | None = None) -> None:
        self._end("rejected" if isinstance(error, RequestError) else "error", admitted, error)
        send_response_or_error(sender, error_response(error))

    def _end(self, outcome: str, admitted: AdmittedRequest | None, error: Exception | None = None) -> None:
        """Counts a request that ends; `admitted`: None where it was not let in."""
        self._metrics.count(outcome)
        if admitted is not None:
            with self._quotas_lock:
                self._tenant_quotas.quotas.end(admitted.uid, admitted.max_total_tokens)
        self._request_log.write(encoder_record(self._model, outcome, admitted, error))

    def _compute_next(self) -> bool:
        batch = self._to_compute.get()
        self._to_answer.put(None if batch is None else (batch, self._compute(batch)))
        return batch is not None

    def _compute(self, batch: list[EncoderRequest]) -> Tensor | Exception:
        try:
            sequences = [sequence for each in batch for sequence in each.sequences]
            self._metrics.observe_batch(sequences)
            return self._encoder.compute(sequences)
        except Exception as error:  # whatever it is, its clients must not wait for ever
            logger.exception("a batch could not be computed")
            return error
        finally:
            self._idle.release()

    def _answer_next(self) -> bool:
        computed = self._to_answer.get()
        if computed is not None:
            self._answer_batch(*computed)
        return computed is not None

    def _answer_batch(self, batch: list[EncoderRequest], result: Tensor | Exception) -> None:
        first = 0
        for each in batch:
            if isinstance(result, Exception):
                self._refuse(each.sender, result, each.admitted)
                continue
            count = self._num_rows(each)
            self._answer(each, result[first : first + count])
            first += count

    def _num_rows(self, each: EncoderRequest) -> int:
        """Of what is computed: a text has one, or each of its tokens has."""
        if self._encoder.parts.head_kind == "token":
            return sum(len(sequence) for sequence in each.sequences)
        return len(each.sequences)

    def _answer(self, each: EncoderRequest, rows: Tensor) -> None:
        try:
            counts = numbers("num_tokens", [[len(sequence)] for sequence in each.sequences], np.int32)
            response = pb_utils.InferenceResponse(output_tensors=[*self._tensors(each, rows), counts])
        except Exception as error:
            logger.exception("an answer could not be made")
            self._refuse(each.sender, error, each.admitted)
            return
        self._end("success", each.admitted)
        send_response_or_error(each.sender, response)

    def _tensors(self, each: EncoderRequest, rows: Tensor) -> list[Any]:
        encoder = self._encoder
        if encoder.task == "embed":
            embeddings = encoder.finish_embeddings(rows, each.dimensions, each.normalize)
            return [pb_utils.Tensor("embedding", embeddings)]
        if encoder.task == "rerank":
            return [pb_utils.Tensor("score", np.ascontiguousarray(rows.numpy()))]
        if encoder.parts.head_kind == "token":
            parts = rows.split([len(sequence) for sequence in each.sequences])
            labelled = [
                encoder.finish_tokens(text, part, each.label_rows, each.truncate)
                for text, part in zip(each.texts, parts, strict=True)
            ]
            return [_column("tokens", [msgspec.json.encode(tokens) for tokens in labelled])]
        classes = encoder.finish_classes(rows, each.label_rows)
        return [
            _column("label", [each.label.encode() for each in classes]),
            numbers("score", [[each.score] for each in classes], np.float32),
            _column("scores", [msgspec.json.encode(each.scores) for each in classes]),
        ]

    def finalize(self) -> None:
        """Ends the threads; requests in flight have been drained before."""
        self._to_compute.put(None)
        for thread in self._threads:
            thread.join()
        self._request_log.close()


def _load(settings: EncoderSettings) -> Encoder:
    limit_spinning()
    import torch  # after it

    from fastserve.encoders.encoder import Encoder

    torch.set_num_threads(settings.num_threads)
    return Encoder.load(
        settings.model, dtype=settings.dtype, quantization=settings.quantization, device=settings.device
    )


def _column(name: str, values: Sequence[bytes]) -> Any:
    """A STRING tensor [len(values), 1]."""
    return pb_utils.Tensor(name, np.array(values, dtype=np.object_).reshape(-1, 1))
