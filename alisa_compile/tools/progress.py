"""What the user sees while waiting, on standard error: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ..backend import compile_listeners, compile_start_listeners
from ..runtime.report import CompileRow

_TICK_SECONDS = 0.5
_STAGE = "{desc} ... {elapsed_s:.0f} s"
_TOKENS = "{desc} |{bar}| {n_fmt}/{total_fmt} tokens [{elapsed}, {rate_fmt}]"


class Progress:
    """One thing at a time: a stage with its seconds, or a bar that counts tokens.

    Compilations announce themselves through the backend's listeners. A thread redraws, because a compilation
    does not return to us for many seconds. Warnings of the package come here too, so that they spare the bar.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._stream = sys.stderr
        self._quiet = quiet
        self._on_terminal = self._stream.isatty()
        self._bar: Any = None
        self._tokens: tuple[str, int] | None = None  # label and total of the run in progress
        self._done = 0
        self._began = 0.0
        self._hidden = False
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="alisa-progress", daemon=True)
        self._handler = _LineHandler(self)

    def __enter__(self) -> Progress:
        compile_start_listeners.append(self._compiling)
        compile_listeners.append(self._compiled)
        logging.getLogger("alisa_compile").addHandler(self._handler)
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        compile_start_listeners.remove(self._compiling)
        compile_listeners.remove(self._compiled)
        logging.getLogger("alisa_compile").removeHandler(self._handler)
        self._stopped.set()
        self._ticker.join()
        self.hide()

    def stage(self, text: str) -> None:
        """Something has begun whose length nobody knows."""
        self._draw(text, None, _STAGE)
        if not self._on_terminal and not self._quiet:
            self.line(text)

    def start_tokens(self, label: str, total: int) -> None:
        """A generation begins: the prompt first, then `token()` for each token."""
        self._tokens, self._done, self._began, self._hidden = (label, total), 0, time.perf_counter(), False
        self.stage(f"{label}: reading the prompt")

    def token(self) -> None:
        """One token more."""
        self._done += 1
        if self._done == 1:
            self._draw_tokens()
        elif self._bar is not None:
            with self._lock:
                self._bar.update()

    def end_tokens(self) -> None:
        """The generation is over."""
        label, _ = self._tokens or ("", 0)
        self._tokens = None
        self._clear()
        if not self._on_terminal and not self._quiet:
            self.line(f"{label}: {self._done} tokens in {time.perf_counter() - self._began:.1f} s")

    def hide(self) -> None:
        """Draw nothing until the next generation: the terminal now belongs to the text."""
        self._hidden = True
        self._clear()

    def line(self, text: str) -> None:
        """A message of its own, above the bar if there is one."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            print(f"alisa: {text}", file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()

    def _compiling(self, stage: str) -> None:
        self.stage(f"compiling the {stage} graph")

    def _compiled(self, row: CompileRow) -> None:
        if not self._on_terminal and not self._quiet:
            self.line(f"compiled the {row.stage} graph in {row.seconds:.1f} s")
        if self._done:
            self._draw_tokens()
        elif self._tokens is not None:
            self._draw(f"{self._tokens[0]}: reading the prompt", None, _STAGE)

    def _draw_tokens(self) -> None:
        if self._tokens is not None:
            label, total = self._tokens
            self._draw(label, total, _TOKENS)

    def _draw(self, text: str, total: int | None, layout: str) -> None:
        """Replace what is on the terminal. A bar starts at the tokens so far, so that its rate leaves out the
        compilation before them."""
        if not self._on_terminal or self._quiet or self._hidden:
            return
        with self._lock:
            self._clear()
            self._bar = tqdm(
                desc=text,
                total=total,
                initial=0 if total is None else self._done,
                bar_format=layout,
                unit="tok",
                file=self._stream,
                leave=False,
                dynamic_ncols=True,
            )

    def _clear(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def _tick(self) -> None:
        while not self._stopped.wait(_TICK_SECONDS):
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()


class _LineHandler(logging.Handler):
    """Warnings of alisa as lines of the command."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.line(f"{record.levelname.lower()}: {record.getMessage()}")
