"""What counts as which tissue, and how it is looked at: one definition in HU for every table and page."""

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
# What a viewer offers in place of the window of the images.
WINDOWS_HU = {"soft tissue": (-160.0, 240.0), "lung": (-1350.0, 150.0), "bone": (-500.0, 1300.0)}


def tissue_map(array_hu: np.ndarray) -> np.ndarray:
    """The place in TISSUES_HU of each voxel's tissue, from 1, as uint8 of the same shape; 0: none of them."""
    tissues = np.zeros(np.shape(array_hu), np.uint8)
    for place, (low, high) in enumerate(TISSUES_HU.values(), start=1):
        tissues[(array_hu > low) & (array_hu <= high)] = place
    return tissues
