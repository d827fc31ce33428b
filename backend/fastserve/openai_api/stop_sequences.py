"""Which stop sequence has ended an answer, found while its text comes."""

from __future__ import annotations

from collections.abc import Sequence


class StopSequences:
    """Takes an answer's text with the stop sequence at its end, and gives it without."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = sorted(sequences, key=len, reverse=True)
        self._longest = max(map(len, sequences), default=0)
        self._held = ""
        self.found: str | None = None
        """The sequence that has ended the answer."""

    def push(self, text: str, is_last: bool, is_stopped: bool) -> str:
        """Text that stands before any stop sequence for certain. `is_stopped`: it ended, not for length."""
        self._held += text
        if not is_last:
            certain = max(0, len(self._held) - self._longest)
            shown, self._held = self._held[:certain], self._held[certain:]
            return shown
        if is_stopped:
            self.found = next((each for each in self._sequences if self._held.endswith(each)), None)
        shown, self._held = self._held[: len(self._held) - len(self.found or "")], ""
        return shown
