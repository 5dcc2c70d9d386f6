"""What a person sees of a command: lines, tables, progress. rich is imported late: `--help` needs none of it."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")


def say(text: str) -> None:
    """One plain line."""
    print(text, flush=True)


def show(table: Any) -> None:
    """A rich table, as wide as it needs to be where the output is no terminal."""
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def bar(verb: str) -> Callable[[list[Item]], Iterable[Item]]:
    """What wraps a list to show its progress on stderr, with the rate and the time left."""
    from rich.console import Console
    from rich.progress import track

    return lambda items: track(items, description=verb, console=Console(stderr=True), transient=True)


def training_bar(visible: bool = True) -> Any:
    """A context that gives the `progress` of `train`: one bar a stage with images a second and time left, and losses.

    The losses have a line of their own, so that bars fit 80 columns, which is also what a job's log counts as.
    """
    from contextlib import contextmanager

    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    @contextmanager
    def bars() -> Any:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        stages, losses = Progress(*columns, TimeRemainingColumn()), Text()
        console = Console(stderr=True, quiet=not visible)
        live = Live(Group(stages, losses), console=console)
        tasks: dict[int, Any] = {}

        def progress(stage: int, images: int, total: int, note: str) -> None:
            live.start()  # not before: the bar of what is prepared comes first, and one is live at a time
            if stage not in tasks:
                tasks[stage] = stages.add_task(f"stage {stage}", total=total, completed=images, rate="")
            speed = stages.tasks[tasks[stage]].speed
            stages.update(tasks[stage], completed=images, rate=f"{speed:.1f} images/s" if speed else "")
            losses.plain = note

        try:
            yield progress
        finally:
            live.stop()
            if tasks and not console.is_interactive:
                console.print()  # on a terminal the last line was ended

    return bars()


def fail(error: object, code: int) -> None:
    """Say what went wrong in one line and leave with that code."""
    print(f"seresvit: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


def warn_of_doubts(folders: list[Path]) -> None:
    """Say what `predict` noted in these prediction folders: inputs unlike those of the training."""
    for folder in folders:
        record = folder / "prediction.json"
        for doubt in json.loads(record.read_text(encoding="utf-8")).get("doubts", []) if record.is_file() else []:
            say(f"warning: {folder}: {doubt}")
