"""Text as it is generated, each token in the colour of the drafter that guessed it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from rich.text import Text

from specdec.statistics import Stats

COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


class Palette:
    """Drafters' colours, in the order in which drafters first appear, and how many tokens each has guessed."""

    def __init__(self) -> None:
        self.shares: Counter[str] = Counter()
        self._styles: dict[str, str] = {"": ""}

    def style(self, source: str) -> str:
        """The drafter's colour; none for the target, whose name is empty."""
        return self._styles.setdefault(source, COLOURS[(len(self._styles) - 1) % len(COLOURS)])

    def legend(self) -> Text:
        """Which colour is whose, and each one's share of the tokens."""
        total = max(self.shares.total(), 1)
        parts = [
            Text(f"{source or 'target'} {count / total:.0%}", self.style(source))
            for source, count in self.shares.most_common()
        ]
        return Text("  ").join(parts)


class Printer(Palette):
    """A streamer for one row that prints to a console.

    Text is held back only while its last character is incomplete. ``stats`` says who guessed each token; without it
    all are the target's.
    """

    def __init__(self, console: Console, tokenizer: Any, stats: Stats | None = None):
        super().__init__()
        self.console = console
        self.tokenizer = tokenizer
        self.stats = stats
        self._line: list[int] = []  # tokens since the last line end: what must be decoded together
        self._printed = 0
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Print new tokens; the first call brings the prompt and prints nothing."""
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._print(token)
        self._prompt_seen = True

    def end(self) -> None:
        """Print what was held back, and end the line."""
        self._write(self._text()[self._printed :] + "\n")

    def _print(self, token: int) -> None:
        source = self._source()
        self.shares[source] += 1
        self._line.append(token)
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text[self._printed :], self.style(source))
            self._printed = len(text)
        if text.endswith("\n"):
            self._line, self._printed = [], 0

    def _write(self, text: str, style: str = "") -> None:
        """Past the console's own printing, which expands tabs and drops form feeds."""
        coloured = self.console.color_system is not None and not self.console.no_color
        self.console.file.write(Style.parse(style).render(text) if coloured else text)
        self.console.file.flush()

    def _source(self) -> str:
        return self.stats.sources[0][self.shares.total()] if self.stats and self.stats.sources else ""

    def _text(self) -> str:
        text: str = self.tokenizer.decode(self._line, skip_special_tokens=True)
        return text
