"""Text sources: calibration text, which steps measure and train on, and evaluation text."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class Calibration(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The text that steps measure and train on."""

    files: Annotated[
        tuple[str, ...], Meta(description="plain text files; none: what comes with FastServe")
    ] = ()
    samples: Annotated[int, Meta(ge=2, le=65536, description="windows, to measure on")] = 128
    length: Annotated[int, Meta(ge=16, le=32768, description="tokens of a window")] = 512


class Evaluation(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The text that results are judged by; no step sees it."""

    files: Annotated[
        tuple[str, ...], Meta(description="plain text files; none: what comes with FastServe")
    ] = ()
    length: Annotated[int, Meta(ge=16, le=32768, description="tokens of a window")] = 512
    tokens: Annotated[int, Meta(ge=0, description="at most; 0: all of the text")] = 0
