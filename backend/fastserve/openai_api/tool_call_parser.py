"""Tool calls in the text of an answer, found while it comes."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from fastserve.openai_api.tool_formats import ToolFormat

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""The beginning of a call whose arguments can be handed on while they come."""
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{)")
"""The same in Mistral's newer form."""
_NAME_BEGUN = re.compile(r"[\w.-]+\s*(\[[ARGS]*\]?)?\s*")
_SEPARATORS = ",;[]"


class Content(NamedTuple):
    """Text that is no call."""

    text: str


class Call(NamedTuple):
    """A call begins."""

    name: str


class Arguments(NamedTuple):
    """More of the JSON of the last call's arguments."""

    text: str


Event = Content | Call | Arguments


class _JsonEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """The place after the object's end; None: it goes on. What was searched is not to be given again."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


class ToolCallParser:
    """Makes events of one answer's text, whatever the pieces in which it comes.

    `is_forced`: the answer is calls from its first character on.
    """

    def __init__(self, form: ToolFormat, is_forced: bool = False) -> None:
        self._form = form
        self._text = ""
        self._state = self._start if form.begins_bare or is_forced else self._content
        self._end = _JsonEnd()
        self._rest_is_head = False

    def push(self, text: str) -> list[Event]:
        """The events that the answer's next text completes."""
        self._text += text
        events: list[Event] = []
        while self._state(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """The events of what is left when the answer has ended; a call that never was one is text."""
        text, self._text = self._text, ""
        is_text = self._state in (self._start, self._content, self._object)
        return [Content(text)] if is_text and text.strip() else []

    # Each state returns whether there may be more to do with the text that is there.

    def _start(self, events: list[Event]) -> bool:
        stripped = self._text.lstrip()
        if not stripped:
            return False
        self._state = self._between if stripped[0] in "{[" else self._content
        return True

    def _content(self, events: list[Event]) -> bool:
        marker = self._form.marker
        place = self._text.find(marker)
        if place >= 0:
            self._emit_content(events, self._text[:place].rstrip())
            self._text = self._text[place + len(marker) :]
            self._state = self._between
            return True
        held = next((n for n in range(len(marker) - 1, 0, -1) if self._text.endswith(marker[:n])), 0)
        shown = self._text[: len(self._text) - held].rstrip()  # spaces before a call are not shown
        self._emit_content(events, shown)
        self._text = self._text[len(shown) :]
        return False

    def _emit_content(self, events: list[Event], text: str) -> None:
        if text:
            events.append(Content(text))

    def _between(self, events: list[Event]) -> bool:
        self._text = self._text.lstrip()
        for known in filter(None, (self._form.marker, self._form.end)):
            if self._text.startswith(known):
                self._text = self._text[len(known) :]
                return True
            if known.startswith(self._text):
                return False
        if self._text[0] in _SEPARATORS:
            self._text = self._text[1:]
            return True
        if self._text.startswith("{"):
            self._state, self._end = self._object, _JsonEnd()
            return True
        if self._form.name == "mistral" and _NAME_BEGUN.fullmatch(self._text):
            return False
        if self._form.name == "mistral" and (found := _NAMED.match(self._text)):
            self._begin_arguments(events, found[1], found.end(), has_object=False)
            return True
        self._state = self._content
        return True

    def _object(self, events: list[Event]) -> bool:
        if found := _HEAD.match(self._text):
            self._begin_arguments(events, json.loads(found[1]), found.end(), has_object=True)
            return True
        place = _JsonEnd().find(self._text)
        if place is None:
            return False
        self._emit_whole(events, self._text[:place])
        self._text, self._state = self._text[place:], self._between
        return True

    def _begin_arguments(self, events: list[Event], name: str, place: int, has_object: bool) -> None:
        events.append(Call(name))
        self._text, self._end, self._rest_is_head = self._text[place:], _JsonEnd(), has_object
        self._state = self._arguments

    def _arguments(self, events: list[Event]) -> bool:
        place = self._end.find(self._text)
        shown = self._text if place is None else self._text[:place]
        if shown:
            events.append(Arguments(shown))
        self._text = self._text[len(shown) :]
        if place is None:
            return False
        self._state = self._rest if self._rest_is_head else self._between
        return True

    def _rest(self, events: list[Event]) -> bool:
        """What an object has after its arguments, up to its end."""
        place = self._text.find("}")
        if place < 0:
            self._text = ""
            return False
        self._text, self._state = self._text[place + 1 :], self._between
        return True

    def _emit_whole(self, events: list[Event], text: str) -> None:
        """An object in another order, or with its arguments as a string; text where it is no call."""
        try:
            call = json.loads(text)
        except ValueError:
            call = None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            self._emit_content(events, text)
            return
        arguments = call.get("arguments", call.get("parameters", {}))
        events.append(Call(call["name"]))
        events.append(Arguments(arguments if isinstance(arguments, str) else json.dumps(arguments)))
