"""What ends a sequence: by its tokens, by its text (whatever the pieces, nothing of a stop string leaks)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.scheduling.sequence import Sequence
from fastserve.text.stop_conditions import (
    StopStrings,
    check_stop,
    external_stop,
    has_expired,
    stop_strings_count,
    stop_token_ids,
)
from fastserve.types import Outcome, OutputOptions, Request, SamplingParams, view_of

TEXT = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """The oracle: start and end of the stop string that ends first; of those, the longest."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    end, start = min(found, default=(0, 0))
    return (start, end) if found else None


@given(pieces=st.lists(TEXT, max_size=8), stops=STOPS, included=st.booleans())
def test_agrees_with_a_search_of_the_whole_text(pieces: list[str], stops: list[str], included: bool) -> None:
    whole = "".join(pieces)
    matcher = StopStrings(stops, included)
    pushed = [matcher.push(piece) for piece in pieces]
    shown = "".join(text for text, _ in pushed) + matcher.flush()
    stop = first_stop(whole, stops)
    assert any(stopped for _, stopped in pushed) == (stop is not None)
    assert shown == (whole if stop is None else whole[: stop[1] if included else stop[0]])


@given(pieces=st.lists(TEXT, max_size=8), stops=STOPS)
def test_holds_back_no_more_than_could_begin_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops, False)
    shown = whole = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown, whole = shown + text, whole + piece
        if stopped:
            break
        begins = [stop[:length] for stop in stops for length in range(len(stop))]
        assert len(whole) - len(shown) == max((len(b) for b in begins if whole.endswith(b)), default=0)


@pytest.mark.parametrize(("included", "shown"), [(False, "one"), (True, "one\n\nUser:")])
def test_stop_string_over_several_pieces(included: bool, shown: str) -> None:
    matcher = StopStrings(["\n\nUser:"], included)
    pushed = [matcher.push(piece) for piece in ("one\n", "\nUs", "er: two", " three")]
    assert "".join(text for text, _ in pushed) == shown
    assert [stopped for _, stopped in pushed] == [False, False, True, True]
    assert matcher.flush() == ""


def test_longest_of_those_that_end_together() -> None:
    assert StopStrings(["c", "bc", "abc"], False).push("xabcd") == ("x", True)


def test_stop_string_that_may_not_stop_is_let_through() -> None:
    matcher = StopStrings(["aa"], False)
    first, stopped = matcher.push("xaa", may_stop=False)
    assert not stopped
    second, stopped = matcher.push("a")
    assert (first + second, stopped) == ("xa", True)  # the second and third "a" make one that does stop


# --- by tokens

EOS = 9


def a_request(deadline: float | None = None, **sampling: Any) -> Request:
    return Request("a", "", "", [EOS, 1], SamplingParams(**sampling), OutputOptions(), 0, "", 0.0, deadline)


@pytest.mark.parametrize(
    ("generated", "sampling", "is_guide_complete", "max_model_len", "outcome"),
    [
        ([1, 2], {}, False, 20, None),
        ([1, EOS], {}, False, 20, Outcome.STOP),
        ([1, EOS], {"ignore_eos": True}, False, 20, None),
        ([1, 5], {"stop_token_ids": [5]}, False, 20, Outcome.STOP),
        ([1, 5], {"stop_token_ids": [5], "ignore_eos": True}, False, 20, Outcome.STOP),
        ([EOS, 2], {}, False, 20, None),
        ([1, EOS], {"min_tokens": 2}, False, 20, Outcome.STOP),
        ([1, EOS], {"min_tokens": 3}, False, 20, None),
        ([1, 2], {"min_tokens": 3}, True, 20, Outcome.STOP),
        ([1, 2], {"max_tokens": 2}, False, 20, Outcome.LENGTH),
        ([1, EOS], {"max_tokens": 2}, False, 20, Outcome.STOP),
        ([1, 2], {}, False, 4, Outcome.LENGTH),
        ([1, 2], {}, False, 5, None),
    ],
)
def test_what_the_last_token_ends(
    generated: list[int],
    sampling: dict[str, Any],
    is_guide_complete: bool,
    max_model_len: int,
    outcome: Outcome | None,
) -> None:
    request = a_request(**sampling)
    sequence = Sequence(request, 0, view_of(request), token_ids=request.prompt_token_ids + generated)
    stops = stop_token_ids(request.sampling, [EOS])
    assert check_stop(sequence, stops, is_guide_complete, max_model_len) is outcome


def test_a_stop_string_counts_after_min_tokens() -> None:
    params = SamplingParams(min_tokens=2)
    assert [stop_strings_count(params, number) for number in (1, 2, 3)] == [False, False, True]


# --- from outside


def test_a_deadline_ends_a_request_when_it_comes() -> None:
    assert [has_expired(a_request(deadline=5.0), now) for now in (4.9, 5.0)] == [False, True]
    assert not has_expired(a_request(), 1e9)


def test_what_a_client_is_told_of_a_stop_from_outside() -> None:
    assert external_stop(Outcome.STOP) is None
    for outcome, word in ((Outcome.CANCELLED, "cancelled"), (Outcome.TIMEOUT, "time was over")):
        failure = external_stop(outcome)
        assert failure is not None
        assert failure.code == "CANCELLED"
        assert word in failure.message
