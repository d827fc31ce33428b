"""The request log: a line of JSON for each request, rotated, from several processes at once, with as much
text as was asked for."""

from __future__ import annotations

import json
import multiprocessing
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastserve.access.request_log import (
    KEPT_FILES,
    RequestLog,
    RequestRecord,
    open_request_log,
    record_of,
    refused,
)
from fastserve.config import Config
from fastserve.errors import ErrorCode, RequestError
from fastserve.types import OutputOptions, Request, SamplingParams

SECRET = "bob@example.com"


def a_record(**fields: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "arrival": "now",
        "id": "r",
        "model": "m",
        "outcome": "stop",
        "total_seconds": 1.0,
    }
    return RequestRecord(**(values | fields))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, config: Config, *records: RequestRecord) -> list[dict[str, Any]]:
    log = open_request_log(config)
    for record in records:
        log.write(record)
    log.close()
    return lines(path)


def test_a_request_is_one_line_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    found = written(path, Config(request_log=str(path)), a_record(), a_record(id="two", prompt_tokens=3))
    assert found == [
        {"arrival": "now", "id": "r", "model": "m", "outcome": "stop", "total_seconds": 1.0},
        {
            "arrival": "now",
            "id": "two",
            "model": "m",
            "outcome": "stop",
            "total_seconds": 1.0,
            "prompt_tokens": 3,
        },
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("log_prompts", "prompt"),
    [("none", None), ("masked", "write to [EMAIL]"), ("full", f"write to {SECRET}")],
)
def test_texts_are_written_as_was_asked_for(tmp_path: Path, log_prompts: Any, prompt: str | None) -> None:
    path = tmp_path / "requests.jsonl"
    config = Config(request_log=str(path), log_prompts=log_prompts)
    text = f"write to {SECRET}"
    found = written(path, config, a_record(prompt=text, answers=[text, "no"]))[0]
    assert found.get("prompt") == prompt
    assert found.get("answers") == (None if prompt is None else [prompt, "no"])


def test_texts_without_a_request_log_are_refused() -> None:
    with pytest.raises(
        ValueError, match="`log_prompts`: got full; allowed: none, where there is no `request_log`"
    ):
        Config(log_prompts="full")


def test_without_a_file_nothing_happens() -> None:
    log = open_request_log(Config())
    log.write(a_record())
    assert not log.is_enabled
    log.close()


def test_a_full_file_is_renamed_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path, max_bytes=len(msgspec.json.encode(a_record(id="00"))) + 1)
    for number in range(KEPT_FILES + 4):
        log.write(a_record(id=f"{number:02}"))
    log.close()
    names = [path, *(tmp_path / f"requests.jsonl.{number}" for number in range(1, KEPT_FILES + 1))]
    assert [each["id"] for name in names for each in lines(name)] == ["08", "07", "06", "05", "04", "03"]
    assert sorted(tmp_path.iterdir()) == names


def _write_many(path: Path, name: str) -> None:
    log = RequestLog(path, max_bytes=20_000)
    for number in range(150):
        log.write(a_record(id=f"{name}{number}", uid="x" * 100))
    log.close()


def test_processes_that_write_at_once_lose_no_line_and_tear_none(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    found = [each["id"] for file in tmp_path.iterdir() for each in lines(file)]
    assert len(found) == len(set(found)) == 450
    assert len(list(tmp_path.iterdir())) > 2


def test_a_refusal_has_a_code_and_not_the_sentence(tmp_path: Path) -> None:
    error = RequestError(f"`temperature`: got {SECRET!r}", ErrorCode.INVALID_ARG)
    request = Request(
        uid="u",
        request_id="r",
        prompt=SECRET,
        prompt_token_ids=[1, 2],
        sampling=SamplingParams(),
        output=OutputOptions(),
        priority=3,
        tenant="t",
        arrival=5.0,
        deadline=None,
        key_id="k",
    )
    path = tmp_path / "requests.jsonl"
    found = written(
        path,
        Config(request_log=str(path)),
        refused(error, "rejected", 7.5, request),
        refused(ValueError(SECRET), "error", 7.5, request_id="other"),
        record_of(request, "stop", 6.0),
    )
    assert SECRET not in path.read_text()
    assert [(each["id"], each.get("code"), each["total_seconds"]) for each in found] == [
        ("r", "INVALID_ARG", 2.5),
        ("other", "INTERNAL", 0.0),
        ("r", None, 1.0),
    ]
    assert {name: found[0][name] for name in ("uid", "tenant", "key", "priority", "prompt_tokens")} == {
        "uid": "u",
        "tenant": "t",
        "key": "k",
        "priority": 3,
        "prompt_tokens": 2,
    }
