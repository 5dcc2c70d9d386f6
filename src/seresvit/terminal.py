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
    """A context that gives the `progress` of `train`: one bar a stage with images a second and time left."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bars() -> Any:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        shown = Progress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not visible,
        )
        tasks: dict[int, Any] = {}

        def progress(stage: int, images: int, total: int, note: str) -> None:
            shown.start()  # not before: the bar of what is prepared comes first, and one is live at a time
            if stage not in tasks:
                tasks[stage] = shown.add_task(f"stage {stage}", total=total, completed=images, rate="", note="")
            speed = shown.tasks[tasks[stage]].speed
            rate = f"{speed:.1f} images/s" if speed else ""
            shown.update(tasks[stage], completed=images, note=note, rate=rate)

        try:
            yield progress
        finally:
            shown.stop()

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
