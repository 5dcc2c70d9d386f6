"""Settings: defaults < YAML < --set, closed to unknown keys, every fault one line that helps."""

import pytest
import yaml
from pydantic import ValidationError

from seresvit.config import Config, ConfigError, from_tree, load_config, shipped_config, to_yaml


def test_order_defaults_file_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {batch_size: 3, seed: 5}\n")
    config = load_config(path, ["train.batch_size=7", "model.fusion.kind=concat"])
    assert (config.train.batch_size, config.train.seed, config.train.size) == (7, 5, (256, 256))
    assert config.model.fusion.kind == "concat" and config.model.fusion.reduction == 16


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.stage2.num_imges=1", "did you mean train.stage2.num_images?"),
        ("model.fusoin.kind=se", "did you mean model.fusion?"),
        ("model.fusion.kind=sse", "'attention-gate' or 'spatial-se'"),
        ("train.batch_size=0", "train.batch_size: .* greater than 0"),
        ("data.window_hu=[5, 1]", "lower bound must be below"),
        ("model.vit.heads=7", "multiple of heads"),
        ("train.batch_size", "expected a.b=value"),
        ("train.batch_size.x.y=1", "train.batch_size"),
        ("model.patch_size=3", "model.patch_size"),
        ("data.channels=[T1,T2", "bracket or quote"),
        ("data=5", "data: .* found 5"),
        ("data.channels=5", "data.channels"),
        ("model.in_channels=3", "model.in_channels is 3, data.channels names 0"),
        ("model.out_channels=2", "one target"),
    ],
)
def test_a_wrong_setting_is_one_helpful_line(override, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "just words"])
def test_a_file_that_is_no_settings_is_named(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_a_file_of_another_encoding_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes("# 설정\ntrain: {seed: 1}\n".encode("cp949"))
    with pytest.raises(ConfigError, match=r"c\.yaml: not UTF-8"):
        load_config(tmp_path / "c.yaml")


def test_yaml_round_trip_and_frozen():
    config = load_config(shipped_config("tiny.yaml"), ["train.size=[96,128]"])
    assert from_tree(yaml.safe_load(to_yaml(config)), "again") == config
    with pytest.raises(ValidationError):
        config.train.batch_size = 3


def test_one_number_is_a_square_and_the_token_grid_follows_the_size():
    assert load_config(None, ["train.size=512", "model.patch_size=2"]).token_grid == (16, 16)
    assert load_config(None, ["train.size=[100,60]"]).token_grid == (7, 4)
    assert load_config(None, ["model.token_grid=[3,5]"]).token_grid == (3, 5)


def test_channels_set_the_input_of_the_network():
    assert load_config(None, ["data.channels=[a, b, c]"]).model.in_channels == 3
    with pytest.raises(ConfigError, match=r"model.in_channels is 1, data.channels names 2"):
        load_config(None, ["data.channels=[a, b]", "model.in_channels=1"])


def test_defaults_are_the_paper():
    config = Config()
    assert config.model.vit.model_dump() == {"depth": 12, "width": 768, "heads": 12, "mlp_width": 3072, "dropout": 0.1}
    assert config.model.transformer_blocks == (1, 6) and config.model.fusion.kind == "se"
    assert config.train.adam_betas == (0.5, 0.999) and config.train.stage1.l1_weight == 100
