"""Files of traces."""

from __future__ import annotations

import gzip
import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.workload.arrival import Arrival
from fastserve.workload.trace import TraceError, load_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE = f"{HEADER}\r\n2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8\r\n"
MOONCAKE = [
    {"timestamp": 3000, "input_length": 513, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 4500, "input_length": 512, "output_length": 1, "hash_ids": [0]},
]


def as_lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(directory: Path, content: str | bytes) -> Path:
    path = directory / "trace"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_azure_rows_become_arrivals_from_zero(tmp_path: Path) -> None:
    first, second = load_trace(write(tmp_path, AZURE))
    assert first == Arrival(0.0, 4808, 10)
    assert (second.num_prompt_tokens, second.num_output_tokens) == (3180, 8)
    assert second.time == pytest.approx(0.052, abs=1e-6)


def test_mooncake_rows_bring_the_hashes_of_their_blocks(tmp_path: Path) -> None:
    assert load_trace(write(tmp_path, as_lines(MOONCAKE))) == [
        Arrival(0.0, 513, 5, block_hashes=(0, 1), block_size=512),
        Arrival(1.5, 512, 1, block_hashes=(0,), block_size=512),
    ]


@pytest.mark.parametrize("content", [AZURE, as_lines(MOONCAKE)])
def test_a_gzipped_file_is_read_as_the_plain_one(content: str, tmp_path: Path) -> None:
    plain = load_trace(write(tmp_path, content))
    assert load_trace(write(tmp_path, gzip.compress(content.encode()))) == plain


def test_rows_are_put_in_order_of_time(tmp_path: Path) -> None:
    later, sooner = MOONCAKE[::-1]
    assert [a.time for a in load_trace(write(tmp_path, as_lines([later, sooner])))] == [0.0, 1.5]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 36 * 10**9),  # units of 0.1 us, as the trace has them, in an hour
            st.integers(1, 10**6),
            st.integers(1, 10**4),
        ),
        min_size=1,
    )
)
def test_what_is_written_in_azures_format_is_read(rows: list[tuple[int, int, int]]) -> None:
    rows = sorted(rows, key=lambda row: row[0])
    lines = [HEADER]
    for ticks, prompt, output in rows:
        seconds, rest = divmod(ticks, 10**7)
        moment = datetime(2023, 12, 31, 23, 30) + timedelta(seconds=seconds)
        lines.append(f"{moment:%Y-%m-%d %H:%M:%S}.{rest:07},{prompt},{output}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: "\n".join(lines).encode())
        arrivals = load_trace(Path("trace"))
    assert [(a.num_prompt_tokens, a.num_output_tokens) for a in arrivals] == [row[1:] for row in rows]
    times = [(ticks - rows[0][0]) / 1e7 for ticks, _, _ in rows]
    assert [a.time for a in arrivals] == pytest.approx(times, abs=1e-6)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("", "line 1: got ''; allowed: TIMESTAMP,"),
        ("time,prompt\n", "line 1: got 'time,prompt'"),
        (HEADER, "no rows"),
        (f"{HEADER}\n2023-11-16 18:17:03.9,1,1\n16.11.2023 18:17,1,1", "line 3, TIMESTAMP: got '16.11.2023"),
        (f"{HEADER}\n2023-11-16 18:17:03.9x,1,1", "line 2, TIMESTAMP"),
        (f"{HEADER}\n2023-11-16 18:17:03.9,1.5,1", "line 2, ContextTokens: got '1.5'"),
        (f"{HEADER}\n2023-11-16 18:17:03.9,1,0", "line 2, GeneratedTokens: got '0'"),
        (f"{HEADER}\n2023-11-16 18:17:03.9,{'9' * 5000},0", "line 2, ContextTokens"),
        (f"{HEADER}\n2023-11-16 18:17:03.9,1", "line 2: got 2 columns"),
        (as_lines([MOONCAKE[0], {**MOONCAKE[0], "input_length": "x"}]), r"line 2: .*\$.input_length"),
        (as_lines([{**MOONCAKE[0], "output_length": 0}]), r"line 1: .*\$.output_length"),
        (as_lines([{**MOONCAKE[0], "timestamp": -1}]), r"line 1: .*\$.timestamp"),
        (as_lines([{**MOONCAKE[0], "hash_ids": [1]}]), "line 1, hash_ids: got 1 for 513 tokens; allowed: 2"),
        (as_lines([{"timestamp": 1, "input_length": 1, "output_length": 1}]), "line 1: .*hash_ids"),
        ("{nonsense", "line 1: "),
        (b"\x1f\x8b nonsense", "cannot be read"),
        (gzip.compress(AZURE.encode())[:-9], "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_trace_is_refused_by_line_and_column(
    content: str | bytes, where: str, tmp_path: Path
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TraceError, match=f"^{path}.*{where}"):
        load_trace(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.csv: cannot be read"):
        load_trace(tmp_path / "nowhere.csv")
