"""What a batch job makes of the file of answers that an earlier run left. The job itself: tests/e2e."""

from __future__ import annotations

from pathlib import Path


def test_a_line_that_was_cut_short_is_taken_back(tmp_path: Path) -> None:
    import batch_job

    answers = tmp_path / "answers.jsonl"
    assert batch_job.lines_done(answers) == set()
    answers.write_text('{"line": 1, "text": "a"}\n{"line": 3, "text": "b"}\n{"line": 2, "te')
    assert batch_job.lines_done(answers) == {1, 3}
    assert answers.read_text() == '{"line": 1, "text": "a"}\n{"line": 3, "text": "b"}\n'
    answers.write_text('{"line": 1')
    assert batch_job.lines_done(answers) == set()
    assert answers.read_text() == ""
