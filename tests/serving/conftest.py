"""What the tests of the serving room share: a tiny checkpoint, simulated patients, a queue."""

import pytest
import torch

from seresvit.config import ModelSettings, VitSettings
from seresvit.data import phantom
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.serving.jobs import Jobs


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A checkpoint that predicts in milliseconds, and nothing that is worth a look."""
    torch.manual_seed(0)
    vit = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    network = Generator(ModelSettings(base_channels=4, token_grid=(2, 2), vit=vit))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    header = {
        "data": {"window_hu": [-1024, 2048]},
        "train_size": [32, 32],
        "target_intensity": {"kind": "window", "low": -1024.0, "high": 2048.0, "unit": "HU"},
        "sources": ["110keV"],
        "target": "70keV",
    }
    checkpoint.save(network, path, header)
    return path


@pytest.fixture(scope="session")
def patients(tmp_path_factory):
    """Simulated patients as DICOM: 110keV/P001 and P002, three slices of 32 × 32 each, and 70keV."""
    root = tmp_path_factory.mktemp("patients")
    phantom.simulate(root, patients=2, slices=3, size=32, kev=(70, 110))
    return root


@pytest.fixture
def jobs(tmp_path):
    """A queue of at most three jobs."""
    opened = Jobs(tmp_path / "served", most_waiting=3)
    yield opened
    opened.close()
