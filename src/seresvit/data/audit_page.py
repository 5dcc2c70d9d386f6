"""The audit as a page for people: findings first, then a picture of every case, all in one file."""

import base64
import io
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from seresvit import __version__
from seresvit.data.volume import Volume

# Small, since a page may hold hundreds: three slices, each as source, target and both in a checkerboard.
TILE = 112
SLICES_AT = (0.25, 0.5, 0.75)
SQUARES = 8
GREY_LEVELS = 48
SEVERITIES = ("fault", "warning", "clean")


def overview(source: Volume, target: Volume) -> str:
    """A grey PNG as a data URL: a row a slice, columns source, target, checkerboard."""
    source_rows, target_rows = _tiles(source), _tiles(target)
    squares = np.add.outer(*(np.arange(TILE) * SQUARES // TILE,) * 2) % 2 == 1
    rows = [np.hstack([s, t, np.where(squares, t, s)]) for s, t in zip(source_rows, target_rows, strict=True)]
    picture = np.vstack(rows) // (256 // GREY_LEVELS) * (256 // GREY_LEVELS)
    stream = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _tiles(volume: Volume) -> list[np.ndarray]:
    """TILE × TILE pixels uint8 of three slices in true proportions, grey between their 1st and 99th percentile."""
    planes = volume.array[[round(share * (len(volume.array) - 1)) for share in SLICES_AT]]
    low, high = np.percentile(planes, (1, 99))
    grey = (255 * ((planes - low) / max(high - low, 1e-6)).clip(0, 1)).astype(np.uint8)
    _, row_mm, column_mm = volume.spacing_mm_zyx
    height, width = planes.shape[1] * row_mm, planes.shape[2] * column_mm
    size = tuple(max(1, round(TILE * side / max(height, width))) for side in (width, height))
    tiles = []
    for plane in grey:
        tile = Image.new("L", (TILE, TILE))
        fitted = Image.fromarray(plane).resize(size, Image.Resampling.BOX)
        tile.paste(fitted, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
        tiles.append(np.asarray(tile))
    return tiles


def audit_page(record: dict[str, Any], pictures: dict[str, str]) -> str:
    """HTML of what `audit.json` records; `pictures` are the overviews by the name of their case."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("seresvit.data").joinpath("audit.html.j2").read_text(encoding="utf-8")
    cases = sorted((case | {"severity": _severity(case, record)} for case in record["cases"]), key=_most_severe_first)
    return environment.from_string(template).render(
        version=__version__, pictures=pictures, **(record | {"cases": cases})
    )


def _severity(case: dict[str, Any], record: dict[str, Any]) -> str:
    """The most severe finding in one of the case's images: "fault", "warning", or "clean"."""
    for severity in SEVERITIES[:-1]:
        if any(
            f"{finding['file']}/".startswith(f"{image}/")
            for finding in record[f"{severity}s"]
            for image in case["files"]
        ):
            return severity
    return SEVERITIES[-1]


def _most_severe_first(case: dict[str, Any]) -> int:
    return SEVERITIES.index(case["severity"])
