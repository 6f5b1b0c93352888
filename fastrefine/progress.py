"""Progress on stderr: a tqdm bar on a terminal, elsewhere a line every ten seconds. stdout is left to results."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
EVERY = 10.0  # seconds between two lines
RECENT = 6  # lines over which the speed is measured, for work may become slower


class ProgressBar:
    """What one long piece of work tells while it lasts. To be used in a ``with``.

    total: units of the whole. name: what is done, e.g. "refining"; unit: e.g. "images". done: units that are done already and
    say nothing about the speed. show: True: a bar | None: a bar on a terminal, elsewhere lines | False: nothing.
    """

    def __init__(self, total: int, name: str, unit: str, show: bool | None, *, done: int = 0):
        self.total, self.name, self.unit, self.done = total, name, unit, done
        self.note = ""  # further facts, behind the others
        self._lines = show is None and not sys.stderr.isatty()
        self._started = self._told = time.monotonic()
        self._seen = deque([(0.0, done)], maxlen=RECENT)  # seconds and units of the last lines
        self._bar: Any = None
        if show or (show is None and not self._lines):
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=name, unit=f" {unit}")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def to(self, done: int) -> None:
        """So many units are done by now."""
        self.done = done
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._lines and time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            seconds = self._told - self._started
            print(self.line(seconds), file=sys.stderr, flush=True)
            if done > self._seen[-1][1]:
                self._seen.append((seconds, done))

    def line(self, seconds: float) -> str:
        """The line after so many seconds, with the speed since the first of the recent lines."""
        since, before = self._seen[0]
        speed = (self.done - before) / (seconds - since) if seconds > since else 0.0
        left = f", {span((self.total - self.done) / speed)} left" if speed > 0 else ""
        rate = f"{speed:.1f} {self.unit}/s" if speed >= 1 or not speed else f"{1 / speed:.1f} s each"
        return f"{self.name}: {self.done} of {self.total} {self.unit}, {rate}{left}{self.note and f', {self.note}'}"


def over(items: Iterable[T], total: int, name: str, unit: str, show: bool | None, size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:  # fmt: skip
    """The items, with progress of ``total`` units, of which an item is ``size`` of it."""
    with ProgressBar(total, name, unit, show) as progress:
        for item in items:
            yield item
            progress.to(progress.done + size(item))


def counted(count: int, name: str, show: bool | None) -> Iterator[int]:
    """0 ... count - 1, with progress."""
    return over(range(count), count, name, "iterations", show)


def span(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
