"""PNG and TIFF in and out: a folder with one grey picture a slice, or one TIFF with a page a slice.

They have no geometry: a slice lies at its number, and pixels are taken as 1 mm.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from seresvit.data.volume import MOST_DEFLATED, DataError, Unit, Volume, check_claim, written_whole

TIFF = (".tif", ".tiff")
PICTURES = (".png", *TIFF)
# Pillow's names for 8 and 16 bits of grey; a big-endian TIFF has one of its own.
GREY: dict[str, Unit] = {"L": "uint8", "I;16": "arbitrary", "I;16B": "arbitrary"}
BITS: dict[Unit, int] = {"uint8": 8, "arbitrary": 16}
PHOTOMETRIC, IMAGE_DESCRIPTION = 262, 270  # TIFF 6.0, section 8
WHITE_IS_ZERO = 0


def read_pictures(folder: Path, pixels: bool = True) -> Volume:
    """Grey PNG or TIFF files, one a slice, in the order of the integer at the end of each file's stem.

    `positions_mm` holds these integers. Unit "uint8" for 8 bits, "arbitrary" for 16; `headers` the file names. Without
    `pixels` the array is a view of one 0. Raises DataError: no picture, no number or one twice among the names,
    differing sizes or depths, colour, several pages in a file, damaged pixels.
    """
    folder = Path(folder)
    paths: dict[int, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")):
        digits = re.search(r"(\d+)$", path.stem)
        if digits is None:
            raise DataError(f"{path}: the file name must end in the slice number, as in slice_012.png; rename it")
        number = int(digits[1])
        if number in paths:
            raise DataError(f"{path}: slice number {number} twice, also in {paths[number].name}; rename one")
        paths[number] = path
    if not paths:
        raise DataError(f"{folder}: no PNG or TIFF file found; give the folder that holds the slices of one case")
    numbers = sorted(paths)
    planes = []
    for number in numbers:
        pages = _pages(paths[number], pixels)
        if len(pages) > 1:
            raise DataError(f"{paths[number]}: {len(pages)} pages in a folder of slices; move it out, or split it")
        planes += pages
    return _stacked(planes, numbers, folder, [paths[number].name for number in numbers])


def read_tiff(path: Path, pixels: bool = True) -> Volume:
    """A grey TIFF of one slice a page, at positions 1, 2, ...; units, `pixels` and refusals as in `read_pictures`."""
    planes = _pages(path, pixels)
    numbers = list(range(1, len(planes) + 1))
    return _stacked(planes, numbers, path, [f"page {number}" for number in numbers])


def write_pictures(volume: Volume, path: Path, description: str = "") -> None:
    """Writes the slices as `read_pictures` or `read_tiff` met them: files in the folder `path`, or one TIFF there.

    Values are rounded and clipped to 8 bits for "uint8", 16 for "arbitrary"; `description` becomes the picture's own
    text of that name. A folder is replaced when all is written. Raises DataError: names and slices differ in number,
    another unit, values not finite.
    """
    path = Path(path)
    if len(volume.headers) != len(volume.array) or volume.unit not in BITS:
        raise DataError(
            f"{path}: PNG and TIFF need 8 or 16 bits and a name a slice, found {volume.unit} and {len(volume.headers)}"
            f" names for {len(volume.array)} slices; write it in the format of its source"
        )
    if bad := int((~np.isfinite(volume.array)).sum()):
        raise DataError(f"{path}: values must be finite, found {bad} that are not; nothing was written")
    bits = BITS[volume.unit]
    stored = np.rint(volume.array).clip(0, 2**bits - 1).astype(f"uint{bits}")
    pictures = [Image.fromarray(plane) for plane in stored]
    text = PngInfo()
    if description:
        text.add_itxt("Description", description)
    tiff_text = {IMAGE_DESCRIPTION: description}
    with written_whole(path) as temporary:
        if path.suffix.lower() in TIFF:
            pictures[0].save(temporary, save_all=True, append_images=pictures[1:], tiffinfo=tiff_text)
            return
        temporary.mkdir()
        for name, picture in zip(volume.headers, pictures, strict=True):
            picture.save(temporary / name, pnginfo=text, tiffinfo=tiff_text)


def _stacked(planes: list[tuple[np.ndarray, Unit]], numbers: list[int], path: Path, names: list[str]) -> Volume:
    (first, unit), *others = planes
    for name, (plane, own) in zip(names[1:], others, strict=True):
        if (plane.shape, own) != (first.shape, unit):
            raise DataError(
                f"{path / name}: all slices must have one size and depth, found {plane.shape} in {BITS[own]} bits"
                f" against {first.shape} in {BITS[unit]} in {names[0]}; give each case a folder of its own"
            )
    affine = np.eye(4)
    affine[2, 2] = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    affine[2, 3] = numbers[0]
    shape = (len(planes), *first.shape)
    return Volume(
        array=np.stack([plane for plane, _ in planes]) if any(first.strides) else np.broadcast_to(first[:1, :1], shape),
        affine=affine,
        positions_mm=np.asarray(numbers, dtype=np.float64),
        unit=unit,
        path=path,
        format="png",
        headers=tuple(names),
    )


def picture_array(path: Path) -> np.ndarray:
    """The stored pixels of one picture, (Y, X) or (Y, X, 3), in 8 or 16 bits grey or 8 bits a colour."""
    with _opened(path) as picture:
        if picture.mode not in (*GREY, "RGB"):
            raise DataError(f"{path}: must be grey or RGB, found {picture.mode}; convert it")
        return np.asarray(picture)


def _pages(path: Path, pixels: bool) -> list[tuple[np.ndarray, Unit]]:
    """(Y, X) float32 and unit of every page; without `pixels` the plane is a view of one 0."""
    pages = []
    with _opened(path) as picture:
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            unit = GREY.get(picture.mode)
            if unit is None:
                raise DataError(f"{path}: must be 8- or 16-bit grey, found {picture.mode}; convert it, or give NIfTI")
            plane = np.broadcast_to(np.float32(0), (picture.height, picture.width))
            if pixels:
                plane = np.asarray(picture).astype(np.float32)
            if pixels and unit == "arbitrary" and _white_is_zero(picture):
                plane = 65535 - plane
            pages.append((plane, unit))
    return pages


def _white_is_zero(picture: Image.Image) -> bool:
    """True for a TIFF whose values run from white to black; Pillow itself turns those of 8 bits only."""
    return bool(getattr(picture, "tag_v2", {}).get(PHOTOMETRIC, 1) == WHITE_IS_ZERO)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture, not yet unpacked and claiming no more than its file can hold; whatever fails becomes a DataError."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=["PNG", "TIFF"]) as picture:
            # Two bytes a pixel is what the largest grey picture has; colours have three of one byte.
            shape = (getattr(picture, "n_frames", 1), picture.height, picture.width)
            check_claim(path, shape, 2, path.stat().st_size * MOST_DEFLATED)
            yield picture
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything at a damaged file
        reason = " ".join(str(error).split())[-160:] or type(error).__name__
        raise DataError(f"{path}: not a readable PNG or TIFF ({reason}); copy the file again") from None
