"""One look for all figures: fonts, greys, and colours that the colour-blind can tell apart."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager
from matplotlib.ticker import LogLocator, NullLocator

# Okabe and Ito, Color Universal Design, 2008; sources differ by marker too, for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "^", "s", "D", "v", "P")
# Names of sources may be in Hangul, which Matplotlib's own font lacks.
HANGUL_FONTS = {"Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo"}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", *sorted(HANGUL_FONTS & {font.name for font in fontManager.ttflist})],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": "#aab2b9",
    "axes.labelcolor": "#3c4650",
    "text.color": "#1f272e",
    "xtick.color": "#5c6670",
    "ytick.color": "#5c6670",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8ebed",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def literal(name: str) -> str:
    """The name as it is, for Matplotlib, which would read a formula between its dollars."""
    return name.replace("$", r"\$")


def log_scale(axis: Axes) -> None:
    """Of a training: what its first images lose would flatten all that follow."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())
