"""What ``specdec bench`` shows: how far it is, and the figures at the end."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from specdec.commands import console

if TYPE_CHECKING:
    from specdec.bench.measure import Run
    from specdec.bench.run import Ask, Comparison

DASH = "-"


class Live:
    """A bar for the current repeat, with what runs now and how fast the last run was."""

    def __init__(self, comparison: Comparison) -> None:
        total = len(comparison.asks) * len(comparison.names)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[speed]}"), console=console.notes, transient=True)
        self.task = self.progress.add_task("making methods ready", total=total, speed="")
        self.repeat = 0

    def __enter__(self) -> Live:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def tell(self, repeat: int, ask: Ask, method: str, run: Run | None) -> None:
        """A method is about to run on a prompt (None), or has."""
        if repeat != self.repeat:
            self.repeat = repeat
            self.progress.reset(self.task)
        if run is None:
            self.progress.update(self.task, description=f"repeat {repeat + 1}, {ask.workload}: {method}")
            return
        speed = f"{run.decoded / run.decode:.1f} tokens/s" if run.decode else ""
        self.progress.update(self.task, advance=1, speed=speed)


def report(report: dict[str, Any]) -> None:
    """The figures as a table, then what does not show in it."""
    console.show(_table(report["results"]))
    for name, reason in report["unavailable"].items():
        _say(f"{name} does not run: {reason}")
    for difference in report["differences"]:
        _say(f"differs: {difference['text']}; its times are not shown", "red")
    loops = sum(r["loops"] for r in report["results"] if r["method"] == "plain" and r["workload"] != "all")
    if loops:
        _say(f"{loops} of {len(report['questions'])} answers end in a loop, which is easy to guess")
    disturbance = report["disturbance"]
    if disturbance["disturbed"]:
        what = "no speeds: other load disturbed the run" if disturbance["refused"] else "DISTURBED by other load"
        _say(f"{what}: {disturbance['text']}", "red")
    if disturbance["refused"]:
        _say("run it again when the machine is idle, or give --allow-disturbed to see the figures all the same")
    if beside := report.get("overhead"):
        _say(f"beside each pass of {beside['pass_ms']} ms: {beside['outside_ms']} ms (recycling at 64 nodes)")


def _table(results: list[dict[str, Any]]) -> Table:
    head = ("workload", "method", "tokens", "equal", "per step", "per second", "speed", "95%")
    looping = any(r["loops"] for r in results)
    table = Table(*head, *(["without loops"] if looping else []), box=None)
    for r in results:
        keys = ("tokens_per_step", "tokens_per_second", "speedup", "speedup_low", "speedup_high")
        step, rate, speed, low, high = (_number(r[key]) for key in keys)
        spread = DASH if low == DASH else f"{low} - {high}"
        cells = [r["workload"], r["method"], str(r["tokens"]), "yes" if r["equal"] else "NO", step, rate, speed, spread]
        table.add_row(*cells, *([_number(r["speedup_without_loops"])] if looping else []))
    return table


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _say(text: str, style: str | None = None) -> None:
    console.output.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
