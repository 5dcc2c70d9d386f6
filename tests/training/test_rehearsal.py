"""--dry-run: what it says, the picture, and that it keeps nothing."""

import numpy as np
import pytest
import yaml
from PIL import Image

from seresvit.config import ConfigError, load_config
from seresvit.training import run
from seresvit.training.rehearsal import PICTURE, rehearse
from seresvit.training.stage import stage_network


def test_rehearsal_says_what_training_takes_and_keeps_a_picture_alone(micro, manifest, tmp_path):
    config = load_config(None, micro)
    said = rehearse(config, manifest, tmp_path / "run")
    assert yaml.safe_load(said.partition("\nstage 1:")[0]) == config.model_dump(mode="json")
    for number in (1, 2):
        count = sum(parameter.numel() for parameter in stage_network(config, number).parameters())
        assert f"stage {number}: {count:,} parameters" in said
    assert "images/s" in said and "MiB" in said and "slices: 3 train, 3 val" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [PICTURE]
    picture = np.asarray(Image.open(tmp_path / "run" / PICTURE))
    assert picture.shape == (2 * 32, 2 * 32) and picture.std() > 10


def test_rehearsal_refuses_a_run_of_other_settings(micro, manifest, tmp_path):
    run.begin(tmp_path / "run", load_config(None, micro), {"data_hash": ""})
    (tmp_path / "run" / "checkpoints" / "last").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"train\.seed"):
        rehearse(load_config(None, [*micro, "train.seed=5"]), manifest, tmp_path / "run")
