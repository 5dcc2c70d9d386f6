"""The word SYNTHETIC on a slice: as a bitmap beside the pixels, or in them."""

from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from seresvit.data.volume import Unit

Mark = Literal["overlay", "burned"]
WORD = "SYNTHETIC"


def lettering(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The word and the rim around it, in the upper left corner of a slice: two boolean arrays (rows, columns).

    Letters are a sixteenth of the slice high, or as high as fits its width.
    """
    size = max(rows / 16, 6.0)
    size *= min(1.0, 0.9 * columns / ImageFont.load_default(size).getlength(WORD))
    at, font = (columns // 40 + 1, rows // 40), ImageFont.load_default(size)

    def drawn(rim: int) -> np.ndarray:
        image = Image.new("1", (columns, rows))
        ImageDraw.Draw(image).text(at, WORD, fill=1, font=font, stroke_width=rim)
        return np.array(image)

    word = drawn(0)
    return word, drawn(1) & ~word


def burned(array: np.ndarray, unit: Unit) -> np.ndarray:
    """A copy of the (Z, Y, X) array with the word in every slice: letters of its maximum, a rim of its minimum.

    In HU they are at least 1000 and -1000, so that any usual window shows them.
    """
    word, rim = lettering(*array.shape[1:])
    marked, reach = array.copy(), 1000.0 if unit == "HU" else -np.inf
    marked[:, word], marked[:, rim] = max(array.max(), reach), min(array.min(), -reach)
    return marked
