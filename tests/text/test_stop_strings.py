"""Stop strings are found whatever the pieces, and nothing of them leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.text.stop_strings import StopStrings

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
