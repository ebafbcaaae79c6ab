"""Streamers for `generate`: they move the bar and, if wanted, print the text as it comes."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from .progress import Progress


class CountingStreamer(BaseStreamer):
    """Moves the bar, prints nothing."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Called by generate with the prompt, then with each token."""
        if self._prompt_seen:
            self._progress.token()
        self._prompt_seen = True

    def end(self) -> None:
        """Called by generate once, at the end."""
        self._progress.end_tokens()


class PrintingStreamer(TextStreamer):
    """Prints the new text to standard output.

    On a terminal the bar and the text share the screen, and the decode graph is compiled after the first
    token. So there the first word waits until the second token shows that all is compiled; then the bar goes,
    and the text has the screen to itself.
    """

    def __init__(self, tokenizer: Any, progress: Progress) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._count = CountingStreamer(progress)
        self._progress = progress
        self._held = ""
        self._holding = sys.stdout.isatty()
        self._puts = 0

    def put(self, value: Any) -> None:
        """Called by generate with the prompt, then with each token."""
        self._puts += 1
        self._count.put(value)
        if self._puts > 2:
            self._release()
        super().put(value)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Called by generate once, at the end."""
        self._count.end()
        self._release()
        super().end()  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by TextStreamer with whole words."""
        if self._holding:
            self._held += text
        else:
            print(text, end="\n" if stream_end else "", flush=True)

    def _release(self) -> None:
        if self._holding:
            self._holding = False
            self._progress.hide()
            print(self._held, end="", flush=True)
