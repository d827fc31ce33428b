"""What the steps of a server say to one another is sealed: an imitation is refused, and changes nothing."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastserve.ensemble import secret
from fastserve.errors import ErrorCode, RequestError
from fastserve.types import Accepted, Cancel, CancelById, EngineCapacity, Hold, Outcome, RequestOutput, encode

ROOM = EngineCapacity(
    incarnation="x", serial=10**9, received=0, arrived=0, free_slots=10**6, lowest_key=None, time=0.0
)
UNSIGNED: dict[str, Any] = {
    "capacity": ROOM,
    "stop": Cancel("uid", Outcome.CANCELLED),
    "cancel": CancelById("id", 0.0),
    "hold": Hold(),
    "released": Accepted("uid"),
    "output": RequestOutput("uid", [], final=True),
}


def test_all_who_have_one_parent_share_a_secret_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret, "DIRECTORY", tmp_path)
    with ThreadPoolExecutor(8) as threads:
        secrets = set(threads.map(secret.shared_secret, [os.getpid()] * 32))
    assert len(secrets) == 1
    assert len(secrets.pop()) == secret.SECRET_BYTES
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret.shared_secret(os.getppid()) != secret.shared_secret(os.getpid())


def test_files_of_servers_that_are_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "DIRECTORY", tmp_path)
    living = secret.shared_secret(os.getppid())
    name = next(tmp_path.iterdir()).name
    (tmp_path / f"{name}0").write_bytes(b"of a process with that id which started at another time")
    (tmp_path / "fastserve_secret_1_1_1").write_bytes(b"of another container")
    secret.shared_secret(os.getpid())
    assert not (tmp_path / f"{name}0").exists()
    assert (tmp_path / "fastserve_secret_1_1_1").exists()
    assert secret.shared_secret(os.getppid()) == living


def test_a_file_that_others_could_read_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "DIRECTORY", tmp_path)
    secret.shared_secret(os.getpid())
    next(tmp_path.iterdir()).chmod(0o644)
    with pytest.raises(PermissionError, match="its owner or its mode"):
        secret.shared_secret(os.getpid())


@pytest.mark.parametrize("name", UNSIGNED)
def test_an_unsealed_message_is_refused_by_name(pb_utils: Any, name: str) -> None:
    from fastserve.ensemble.tensors import message_of, strings

    for data in (encode(UNSIGNED[name]), b"", secret.seal("other", encode(UNSIGNED[name]))):
        request = pb_utils.InferenceRequest(inputs=[strings(name, [data])])
        with pytest.raises(
            RequestError, match=f"`{name}`: got a message that is not of this server"
        ) as caught:
            message_of(request, name, type(UNSIGNED[name]))
        assert caught.value.code is ErrorCode.INVALID_ARG


def test_a_sealed_message_that_was_changed_is_refused() -> None:
    sealed = bytearray(secret.seal("capacity", encode(ROOM)))
    assert secret.unseal("capacity", bytes(sealed)) == encode(ROOM)
    sealed[-1] ^= 1
    with pytest.raises(RequestError):
        secret.unseal("capacity", bytes(sealed))


def test_only_this_server_makes_the_ids_of_forwarded_requests() -> None:
    assert secret.is_forwarded_id(secret.forwarded_id())
    assert not any(
        secret.is_forwarded_id(each) for each in ("", "-", "é-é", "a-b", secret.forwarded_id()[:-1])
    )


def test_the_scheduler_refuses_an_imitation_and_serves_what_came_with_it(pb_utils: Any) -> None:
    from fastserve.ensemble.scheduler import SchedulerModel
    from fastserve.ensemble.tensors import message_tensor, read_message, strings
    from fastserve.types import OutputOptions, Request, SamplingParams

    real = Request("uid", "id", "", [1], SamplingParams(), OutputOptions(), 0, "", 0.0, None)
    step = SchedulerModel()
    step.initialize({})
    forged = [
        pb_utils.InferenceRequest(inputs=[strings("capacity", [encode(ROOM)])]),
        pb_utils.InferenceRequest(inputs=[strings("request", [encode(real)])]),
        pb_utils.InferenceRequest(),
    ]
    good = pb_utils.InferenceRequest(inputs=[message_tensor("request", real)])
    step.execute([*forged, good])
    for request in forged:
        assert request.sender.is_final
        assert request.sender.error.message().startswith("INVALID_ARG: `")
    (released,) = good.sender.outputs("released")
    assert read_message("released", released[0], Request) == real
    step.finalize()


def test_a_forwarded_request_is_accepted_at_once_and_fails_in_the_queue_as_data(
    pb_utils: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble.scheduler import SchedulerModel
    from fastserve.ensemble.tensors import message_tensor, read_message
    from fastserve.types import OutputOptions, Refused, Released, Request, SamplingParams

    (tmp_path / "config.json").write_text('{"max_queue_seconds": 0.01}')
    monkeypatch.setenv("FASTSERVE_CONFIG", str(tmp_path / "config.json"))
    step = SchedulerModel()
    step.initialize({})
    requests = []
    for uid in ("first", "second"):  # there is room for one
        request = Request(
            uid, secret.forwarded_id(), "", [1], SamplingParams(), OutputOptions(), 0, "", 0.0, None
        )
        requests.append(pb_utils.InferenceRequest(inputs=[message_tensor("request", request)]))
    step.execute(requests)
    released = []
    for request in requests:
        request.sender.wait()
        assert request.sender.error is None
        released.append(
            [read_message("released", each[0], Released) for each in request.sender.outputs("released")]
        )
    step.finalize()
    assert released[0][0] == Accepted("first")
    assert isinstance(released[0][1], Request)
    assert released[1][0] == Accepted("second")
    assert isinstance(released[1][1], Refused)
    assert (released[1][1].outcome, released[1][1].failure.code) == (Outcome.TIMEOUT, "UNAVAILABLE")
    assert pb_utils.server.metric("fastserve_requests_total", outcome="timeout") == 0  # `postprocess` counts
