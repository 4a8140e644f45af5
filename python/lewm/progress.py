"""Progress bars of the command line: rate, time left, live losses."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A bar that the callbacks of `collect`, `train` and `evaluate` move; a context manager."""

    def __init__(self, unit: str) -> None:
        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(unit + " {task.fields[rate]} {task.fields[note]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=None, rate="", note="")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def count(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total`, with a note. The bar appears with the first call: not before arguments are checked."""
        self._progress.start()
        task = self._progress.tasks[0]
        rate = f"{task.speed:.3g}/s" if task.speed else ""
        self._progress.update(self._task, completed=done, total=total, rate=rate, note=note)

    def collect(self, done: int, total: int, frames: int) -> None:
        """For `lewm.collect`."""
        self.count(done, total, f"{frames:,} frames")

    def train(self, done: int, total: int, metrics: dict[str, float]) -> None:
        """For `lewm.train`: the latest losses beside the bar."""
        shown = (("prediction", "pred", ".3f"), ("sigreg", "sigreg", ".1f"), ("probe_r2", "R2", ".2f"))
        notes = (f"{label} {metrics[name]:{form}}" for name, label, form in shown if name in metrics)
        self.count(done, total, " ".join(notes))
