"""The events that come out do not depend on where the bytes are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve_client.server_sent_events import EventParser


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), max_size=5),
    st.lists(st.integers(1, 7)),
    st.sampled_from(["\n", "\r\n"]),
)
def test_events_however_they_are_cut(texts: list[str], sizes: list[int], newline: str) -> None:
    stream = "".join(f"data: {text}{newline}{newline}" for text in texts).encode()
    parser = EventParser()
    events = []
    for size in sizes:
        events += parser.feed(stream[:size])
        stream = stream[size:]
    events += parser.feed(stream)
    assert [event.decode() for event in events] == texts


def test_lines_of_one_event_are_joined_and_other_lines_are_not_data() -> None:
    assert EventParser().feed(b": hello\nid: 4\ndata:a\ndata: b\n\n\ndata: c\n") == [b"a\nb"]
