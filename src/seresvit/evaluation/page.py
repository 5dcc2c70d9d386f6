"""One HTML file that needs no other: tables in, images and scripts inside, and a policy that loads nothing."""

import io
import json
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from seresvit import __version__
from seresvit.data.volume import DataError, written_whole


def write_page(path: Path, template: str, facts: dict[str, Any], scripts: tuple[str, ...] = ()) -> Path:
    """`path`, with `template` of this folder filled with `facts`, its `scripts` at the end of the page.

    The content security policy names the scripts by their hashes: nothing else runs, and nothing is loaded.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    hashes = [f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts]
    facts = facts | {"version": __version__, "scripts": scripts, "script_hashes": hashes}
    with written_whole(path) as temporary:
        # No line end is rewritten, or the hashes would be of other scripts.
        temporary.write_text(environment.get_template(template).render(facts), encoding="utf-8", newline="\n")
    return path


def read(path: Path, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of the file's text; None where there is no file. Raises DataError for what it cannot read."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({fault}); remove it and run the command that wrote it") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    return read(path, json.loads)


def read_table(path: Path) -> pd.DataFrame | None:
    """A CSV file, whose names stay text though they look like numbers or like "NA"; None where there is none."""
    names = dict.fromkeys(("patient", "source", "split", "fusion", "first", "second"), str)
    return read(path, lambda text: pd.read_csv(io.StringIO(text), dtype=names, keep_default_na=False, na_values=""))


def data_url(png: bytes) -> str:
    """A PNG as the address of an image that lies in the page itself."""
    return "data:image/png;base64," + b64encode(png).decode()
