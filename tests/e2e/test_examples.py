"""The examples that call a server, as programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.e2e.conftest import RunningServer

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 120


def run(
    server: RunningServer, name: str, *words: str | Path, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    """The program, ended, with its two outputs."""
    command = [sys.executable, EXAMPLES / name, "--url", server.grpc_url, *words]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_chat(server: RunningServer) -> None:
    typed = "What is the capital of France?\nAnd that of Italy?\n\nnot read any more\n"
    done = run(
        server, "chat.py", "--temperature", "0", "--system", "You answer in one sentence.", typed=typed
    )
    assert (done.returncode, done.stderr) == (0, "")
    answers = done.stdout.split("> ")[1:]
    assert len(answers) == 3, "two questions, then the empty line"
    assert "Paris" in answers[0]
    assert "Rome" in answers[1], "the second question needs the first"
    assert answers[2] == ""


def test_chat_shows_a_refusal(server: RunningServer) -> None:
    done = run(server, "chat.py", "--temperature", "-1", typed="Hello\n\n")
    assert done.returncode == 0
    assert "INVALID_ARG: `temperature`: got -1" in done.stdout


def test_priorities(server: RunningServer) -> None:
    words = ("--priorities", "0", "10", "--streams", "3", "--max-tokens", "8")
    done = run(server, "priorities.py", *words)
    assert (done.returncode, done.stderr) == (0, "")
    _, *rows = (line.split() for line in done.stdout.splitlines())
    assert [row[:3] for row in rows] == [["10", "3", "24"], ["0", "3", "24"]]
    for row in rows:
        median_first, longest_first, median_end = map(float, row[3:])
        assert 0 < median_first <= longest_first
        assert median_first <= median_end


def test_a_batch_job_goes_on_where_it_was(server: RunningServer, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("The capital of France is\n\nThe capital of Italy is\nOne, two,\n")
    kept = {
        "line": 1,
        "prompt": "The capital of France is",
        "text": "from an earlier run",
        "finish_reason": "stop",
    }
    answers.write_text(json.dumps(kept) + "\n" + '{"line": 3, "prompt": "The cap')
    done = run(server, "batch_job.py", prompts, answers, "--concurrency", "2", "--max-tokens", "8")
    assert (done.returncode, done.stderr) == (0, "1 lines have their answer, 2 are left\n")
    written = {each["line"]: each for each in map(json.loads, answers.read_text().splitlines())}
    assert written.keys() == {1, 3, 4}
    assert written[1] == kept
    assert "Rome" in written[3]["text"]
    assert written[4]["finish_reason"] == "length"


def test_a_batch_job_says_what_failed_and_tries_it_again(server: RunningServer, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("One, two,\n")
    done = run(server, "batch_job.py", prompts, answers, "--max-tokens", "-1")
    assert done.returncode == 1
    assert "line 1: INVALID_ARG: `max_tokens`: got -1" in done.stderr
    assert answers.read_text() == ""
    assert run(server, "batch_job.py", prompts, answers, "--max-tokens", "2").returncode == 0
    assert json.loads(answers.read_text())["line"] == 1
