"""Simulated patients of a few pixels, and a network small enough to be trained and killed many times."""

import pytest
import torch

from seresvit.data import phantom

MICRO = [
    "model.base_channels=4",
    "model.vit={depth: 1, width: 16, heads: 2, mlp_width: 16}",
    "data.max_rotation_deg=5",
    "train.size=32",
    "train.batch_size=2",
    "train.accumulate=2",
    "train.clip_norm=10",
    "train.ema_images=6",
    "train.discriminator_channels=4",
    "train.precision=32-true",
    "train.save_every_images=4",
    "train.validate_every_images=4",
    "train.validation_slices=4",
    "train.stage1={num_images: 8, learning_rate: 0.002}",
    "train.stage2={num_images: 12, learning_rate: 0.002, vit_learning_rate: 0.001, schedule: cosine}",
]


@pytest.fixture(scope="session")
def micro():
    """Settings of a run of seconds in which everything that a resumed run must restore is switched on."""
    return MICRO


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("patients")
    phantom.simulate(root / "dicom", patients=3, slices=3, size=32, kev=(70, 110))
    rows = ["patient,split,source,target,source_path,target_path,mask_path"]
    for patient, split in (("P001", "train"), ("P002", "val"), ("P003", "test")):
        rows.append(f"{patient},{split},110keV,70keV,dicom/110keV/{patient},dicom/70keV/{patient},")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root / "manifest.csv"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Children of a fork have no other threads, and sums depend on how many share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
