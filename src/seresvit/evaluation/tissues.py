"""What counts as which tissue, what its region is called and how it is looked at, for every table and page."""

import numpy as np

# -300 to -150 is partial volume of lung and wall and counts for nothing; iodine denser than 250 HU cannot be told from
# bone this way.
BODY_ABOVE_HU = -950.0
TISSUES_HU = {
    "lung": (-950.0, -300.0),
    "fat": (-150.0, -20.0),
    "soft": (-20.0, 100.0),
    "contrast": (100.0, 250.0),
    "bone": (250.0, np.inf),
}
# Regions that are no tissue: all pixels, and all that is inside the body. A label may be called "body" for what is none
# of the tissues.
IMAGE, WHOLE_BODY = "image", "whole_body"
# What a viewer offers in place of the window of the images.
WINDOWS_HU = {"soft tissue": (-160.0, 240.0), "lung": (-1350.0, 150.0), "bone": (-500.0, 1300.0)}


def tissue_map(array_hu: np.ndarray) -> np.ndarray:
    """The place in TISSUES_HU of each voxel's tissue, from 1, as uint8 of the same shape; 0: none of them."""
    tissues = np.zeros(np.shape(array_hu), np.uint8)
    for place, (low, high) in enumerate(TISSUES_HU.values(), start=1):
        tissues[(array_hu > low) & (array_hu <= high)] = place
    return tissues


def label_regions(names: dict[str, int]) -> dict[str, int]:
    """Labels by the names of their regions: their own, behind "label_" where that is a region's of ours.

    Ours are `image`, `whole_body`, and `hu_` with whatever follows.
    """
    regions: dict[str, int] = {}
    for name, value in names.items():
        region = f"label_{name}" if _is_ours(name) else name
        while region != name and region in names:
            region = f"label_{region}"
        regions[region] = value
    return regions


def _is_ours(name: str) -> bool:
    return name in (IMAGE, WHOLE_BODY) or name.startswith("hu_")
