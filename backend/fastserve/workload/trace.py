"""Traces of real use: the files of Azure's and Mooncake's, as they were published, gzipped or not.

    Azure LLM inference trace 2023    CSV: TIMESTAMP,ContextTokens,GeneratedTokens
    Mooncake (FAST '25)               JSON lines: timestamp in ms, input_length, output_length, hash_ids

Which one a file is shows in its first line.
"""

from __future__ import annotations

import gzip
import zlib
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from fastserve.workload.arrival import Arrival

MOONCAKE_BLOCK_SIZE = 512
"""Tokens that one of its `hash_ids` names."""
AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
MAX_DIGITS = 9
GZIP_MAGIC = b"\x1f\x8b"


class TraceError(Exception):
    """A trace that cannot be read; the sentence names the file, the line and the column."""


def load_trace(path: Path) -> list[Arrival]:
    """The arrivals of a trace file, by time; the first is at 0 s. Raises TraceError."""
    lines = _lines(path)
    first = lines[0] if lines else ""
    if first.startswith("{"):
        arrivals = [_mooncake_arrival(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]
    elif first.split(",") == AZURE_COLUMNS:
        arrivals = [_azure_arrival(line, f"{path}, line {n}") for n, line in enumerate(lines[1:], 2) if line]
    else:
        raise TraceError(
            f"{path}, line 1: got {first[:80]!r}; allowed: {','.join(AZURE_COLUMNS)} (Azure), or an object "
            "with timestamp, input_length, output_length and hash_ids (Mooncake)"
        )
    if not arrivals:
        raise TraceError(f"{path}: it has no rows")
    return _from_zero(arrivals)


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
        return content.decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error


def _from_zero(arrivals: list[Arrival]) -> list[Arrival]:
    ordered = sorted(arrivals, key=lambda arrival: arrival.time)
    start = ordered[0].time
    return [msgspec.structs.replace(arrival, time=arrival.time - start) for arrival in ordered]


def _azure_arrival(line: str, where: str) -> Arrival:
    row = line.split(",")
    if len(row) != len(AZURE_COLUMNS):
        raise TraceError(f"{where}: got {len(row)} columns; allowed: {','.join(AZURE_COLUMNS)}")
    timestamp, *counts = row
    num_prompt_tokens, num_output_tokens = (
        _count(count, f"{where}, {column}") for count, column in zip(counts, AZURE_COLUMNS[1:], strict=True)
    )
    return Arrival(_seconds(timestamp, f"{where}, TIMESTAMP"), num_prompt_tokens, num_output_tokens)


def _seconds(timestamp: str, where: str) -> float:
    """Seconds since 1970, of `2023-11-16 18:17:03.9799600`: Python's own parser takes six decimals only."""
    moment, _, decimals = timestamp.partition(".")
    try:
        if not (decimals or "0").isdecimal():
            raise ValueError(decimals)
        whole = datetime.strptime(f"{moment}+0000", "%Y-%m-%d %H:%M:%S%z").timestamp()
    except ValueError as error:
        raise TraceError(f"{where}: got {timestamp!r}; allowed: YYYY-MM-DD HH:MM:SS.decimals") from error
    return whole + float(f"0.{decimals or 0}")


def _count(text: str, where: str) -> int:
    if not text.isdecimal() or len(text) > MAX_DIGITS or int(text) < 1:
        raise TraceError(f"{where}: got {text[:80]!r}; allowed: a whole number above 0")
    return int(text)


class _MooncakeRow(Struct, frozen=True):
    timestamp: Annotated[float, Meta(ge=0)]
    """Milliseconds."""
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=1)]
    hash_ids: tuple[Annotated[int, Meta(ge=0)], ...]


_mooncake_row = msgspec.json.Decoder(_MooncakeRow)


def _mooncake_arrival(line: str, where: str) -> Arrival:
    try:
        row = _mooncake_row.decode(line)
    except msgspec.DecodeError as error:  # which names the column
        raise TraceError(f"{where}: {error}") from error
    num_blocks = -(-row.input_length // MOONCAKE_BLOCK_SIZE)
    if len(row.hash_ids) != num_blocks:
        raise TraceError(
            f"{where}, hash_ids: got {len(row.hash_ids)} for {row.input_length} tokens; allowed: "
            f"{num_blocks}, one for each {MOONCAKE_BLOCK_SIZE} tokens"
        )
    return Arrival(
        row.timestamp / 1e3,
        row.input_length,
        row.output_length,
        block_hashes=row.hash_ids,
        block_size=MOONCAKE_BLOCK_SIZE,
    )
