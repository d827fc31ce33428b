"""Tools of a chat: how a request shows or forces them, and the calls in its answer."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from fastserve.openai_api.errors import refusal
from fastserve.openai_api.tool_call_parser import Arguments, Call, Content, Event, ToolCallParser
from fastserve.openai_api.tool_formats import ToolFormat, forced_grammar, with_tools_in_prompt


class Function(Struct, forbid_unknown_fields=True):
    """`tools[].function`. Forced calls follow `parameters` strictly, whatever `strict` says."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def json(self) -> dict[str, Any]:
        """As the model is shown it."""
        shown = {"name": self.name, "description": self.description or ""}
        return shown | {"parameters": self.parameters or {"type": "object", "properties": {}}}


class Tool(Struct, forbid_unknown_fields=True):
    """`tools[]`."""

    type: str
    function: Function


class ChatTools:
    """The tools of one request."""

    def __init__(
        self,
        form: ToolFormat | None,
        tools: list[Tool] | None,
        choice: str | Mapping[str, Any] | None,
        is_parallel: bool,
    ) -> None:
        """`form`: None where the model's own is not known. Raises ApiError."""
        self._form, self._is_parallel = form, is_parallel
        self._tools = tools or []
        for index, tool in enumerate(self._tools):
            if tool.type != "function":
                raise refusal(f"tools[{index}].type", f"got {tool.type!r}; allowed: 'function'")
        if self._tools and form is None:
            raise refusal("tools", "got some; allowed: none, as it is not known how the model writes calls")
        self._forced = self._forced_functions(choice)
        self.is_named = isinstance(choice, Mapping)
        if choice == "none":
            self._tools = []

    def _forced_functions(self, choice: str | Mapping[str, Any] | None) -> list[Function]:
        functions = [tool.function for tool in self._tools]
        if choice in (None, "auto", "none"):
            return []
        if not functions:
            raise refusal("tool_choice", "got one; allowed: only beside `tools`")
        if choice == "required":
            return functions
        named = choice.get("function") if isinstance(choice, Mapping) else None
        name = named.get("name") if isinstance(named, Mapping) else None
        found = [function for function in functions if function.name == name]
        if not found:
            names = ", ".join(function.name for function in functions)
            raise refusal(
                "tool_choice",
                f"got {str(choice)[:80]!r}; allowed: none, auto, required, or an object with the name of one "
                f"of the functions {names}",
            )
        return found[:1]

    def add_to(self, options: dict[str, Any]) -> None:
        """Puts the tools into the options of the client's call. Raises ApiError."""
        form = self._form
        if form is not None and form.is_prompted:
            tools = [{"function": tool.function.json()} for tool in self._tools]
            options["messages"] = with_tools_in_prompt(options["messages"], tools)
        elif self._tools:
            options["tools"] = [{"type": "function", "function": t.function.json()} for t in self._tools]
        if form is not None and self._tools and form.has_special_marker:
            options["skip_special_tokens"] = False
        if form is not None and self._forced:
            if "structured_outputs" in options:
                raise refusal(
                    "tool_choice", "got a guide beside it, which calls cannot follow; allowed: auto"
                )
            functions = [function.json() for function in self._forced]
            several = self._is_parallel and not self.is_named
            options["structured_outputs"] = {"grammar": forced_grammar(form, functions, several)}

    def new_calls(self) -> ChoiceCalls | None:
        """What finds the calls in the text of a choice; None where there are to be none."""
        if self._form is None or not self._tools:
            return None
        return ChoiceCalls(ToolCallParser(self._form, bool(self._forced)), self._is_parallel)


class ChoiceCalls:
    """The calls of one choice, as its text comes."""

    def __init__(self, parser: ToolCallParser, is_parallel: bool) -> None:
        self._parser, self._is_parallel = parser, is_parallel
        self._count = 0

    @property
    def is_called(self) -> bool:
        """Whether there has been a call."""
        return self._count > 0

    def deltas(self, text: str, is_last: bool) -> list[dict[str, Any]]:
        """OpenAI's `delta` objects for the next text."""
        events = self._parser.push(text) + (self._parser.finish() if is_last else [])
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def message(self, text: str) -> dict[str, Any]:
        """The whole message: that to which the deltas add up."""
        content, calls = "", list[dict[str, Any]]()
        for delta in self.deltas(text, True):
            content += delta.get("content", "")
            for part in delta.get("tool_calls", []):
                if "id" in part:
                    calls.append({key: value for key, value in part.items() if key != "index"})
                else:
                    calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        return {"content": content or None} | ({"tool_calls": calls} if calls else {})

    def _delta(self, event: Event) -> dict[str, Any] | None:
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, Call):
            self._count += 1
        if self._count > 1 and not self._is_parallel:
            return None
        call: dict[str, Any] = {"index": self._count - 1}
        if isinstance(event, Arguments):
            return {"tool_calls": [call | {"function": {"arguments": event.text}}]}
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [call | {"id": _new_id(), "type": "function", "function": function}]}


def _new_id() -> str:
    """As long as Mistral's templates want the ids of calls."""
    return uuid.uuid4().hex[:9]
