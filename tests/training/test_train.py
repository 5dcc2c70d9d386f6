"""Training on simulated patients: what a run leaves behind, and that an interrupted one ends the same."""

import json

import pytest
import torch
import yaml

from seresvit.config import ConfigError, load_config
from seresvit.data import phantom
from seresvit.data.audit import audit, write
from seresvit.data.dataset import prepare
from seresvit.data.volume import DataError
from seresvit.model import checkpoint
from seresvit.training import train as training
from seresvit.training.losses import discriminator_loss, generator_losses, lsgan

MICRO = [
    "model.base_channels=4",
    "model.vit={depth: 1, width: 16, heads: 2, mlp_width: 16}",
    "train.size=32",
    "train.batch_size=2",
    "train.discriminator_channels=4",
    "train.precision=32-true",
    "train.save_every_images=4",
    "train.validate_every_images=4",
    "train.validation_slices=4",
    "train.stage1={num_images: 8, learning_rate: 0.002}",
    "train.stage2={num_images: 12, learning_rate: 0.002}",
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("patients")
    phantom.simulate(root / "dicom", patients=3, slices=3, size=32, kev=(70, 110))
    found = audit(root / "dicom", ["110keV"], "70keV", val=["P002"], test=["P003"])
    assert write(found, root / "manifest.csv")
    return root / "manifest.csv"


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory):
    """(settings, run folder) of an uninterrupted run."""
    config = load_config(None, MICRO)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    training.train(config, manifest, folder)
    return config, folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_run_folder_says_what_was_done(finished, manifest):
    config, folder = finished
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.model_dump(mode="json")
    record = json.loads((folder / "manifest.json").read_text())
    assert record["torch"] == torch.__version__ and record["seed"] == 0
    assert record["num_patients"] == {"train": 1, "val": 1, "test": 1}
    assert record["data_hash"] == prepare(manifest, config.data).data_hash
    assert list(folder.glob("events.out.tfevents*"))
    lines = log_of(folder)
    assert {(line["stage"], line["images"]) for line in lines if "val_mae" in line} == {
        (1, 4),
        (1, 8),
        (2, 4),
        (2, 8),
        (2, 12),
    }
    assert all({"l1", "adversarial", "discriminator"} <= line.keys() for line in lines if "l1" in line)


def test_stage_one_has_no_transformer_and_stage_two_starts_from_its_weights(finished, manifest, tmp_path):
    config, _ = finished
    stage1_only = load_config(None, [*MICRO, "train.stage2.num_images=0"])
    best = training.train(stage1_only, manifest, tmp_path / "one")
    assert checkpoint.load(best).settings.transformer_blocks == ()
    last = tmp_path / "one" / "checkpoints" / "last" / "model.safetensors"
    generator = training.stage_network(config, 2)
    training.take_weights(generator, last)
    ours, theirs = generator.state_dict(), checkpoint.load(last).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert ours.keys() - theirs.keys() and all("art_" in k or "transformer" in k for k in ours.keys() - theirs.keys())


def test_best_checkpoint_is_enough_to_predict(finished):
    _, folder = finished
    network = checkpoint.load(folder / "checkpoints" / "best" / "model.safetensors")
    assert network.settings.transformer_blocks == (1, 6)
    assert network.header["sources"] == ["110keV"] and network.header["target"] == "70keV"
    assert network.header["target_intensity"]["high"] == 3071
    best = min(line["val_mae"] for line in log_of(folder) if line["stage"] == 2 and "val_mae" in line)
    assert network.header["val_mae"] == best


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage, images", [(1, 6), (2, 4), (2, 10)])
def test_an_interrupted_run_ends_with_the_same_weights(finished, manifest, tmp_path, stage, images):
    config, folder = finished

    def kill(*seen):
        if seen[:2] == (stage, images):
            raise Killed

    with pytest.raises(Killed):
        training.train(config, manifest, tmp_path / "run", kill)
    training.train(config, manifest, tmp_path / "run")
    for name in ("model", "discriminator"):
        whole, resumed = (
            checkpoint.read(run / "checkpoints" / "last" / f"{name}.safetensors")[0]
            for run in (folder, tmp_path / "run")
        )
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_finished_run_is_left_as_it_is(finished, manifest):
    config, folder = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name}
    training.train(config, manifest, folder)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name}


def test_another_setting_on_an_old_run_is_refused_by_name(finished, manifest):
    _, folder = finished
    with pytest.raises(ConfigError, match=r"train.stage2.learning_rate.*another --run-dir"):
        training.train(load_config(None, [*MICRO, "train.stage2.learning_rate=0.1"]), manifest, folder)


def test_nothing_to_train_and_no_validation_are_refused(manifest, tmp_path):
    nothing = load_config(None, [*MICRO, "train.stage1.num_images=0", "train.stage2.num_images=0"])
    with pytest.raises(ConfigError, match="nothing to train"):
        training.train(nothing, manifest, tmp_path / "run")
    text = manifest.read_text()
    without = manifest.with_name("without.csv")
    without.write_text("\n".join(line for line in text.splitlines() if ",val," not in line) + "\n")
    with pytest.raises(DataError, match="no case in the val split"):
        training.train(load_config(None, MICRO), without, tmp_path / "run")


def test_a_diverged_loss_stops_the_run_in_one_line(manifest, tmp_path):
    config = load_config(None, [*MICRO, "train.stage1.l1_weight=1.0e+39"])
    with pytest.raises(DataError, match=r"not finite .* train.stage1.learning_rate") as error:
        training.train(config, manifest, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_learning_rate_is_constant_then_falls_to_zero():
    config = load_config(None, ["train.stage1={num_images: 100, learning_rate: 0.1, constant_share: 0.5}"])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    for images in (0, 49, 50, 75, 99):
        stage = training.Stage(1, config.train.stage1, None, optimizer, None, optimizer, images)
        training.set_learning_rate(stage)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.002])


def test_training_lowers_the_error(manifest, tmp_path):
    config = load_config(
        None,
        [
            *MICRO,
            "train.stage1={num_images: 240, learning_rate: 0.005, constant_share: 0.5}",
            "train.stage2.num_images=0",
            "train.validate_every_images=40",
        ],
    )
    training.train(config, manifest, tmp_path / "run")
    maes = [line["val_mae"] for line in log_of(tmp_path / "run") if "val_mae" in line]
    assert maes[-1] < maes[0] / 2


def test_stage_two_starts_from_a_published_file(manifest, tmp_path, monkeypatch):
    vit = "model.vit={depth: 1, width: 64, heads: 1, mlp_width: 16}"
    config = load_config(None, [*MICRO, vit, "train.stage1.num_images=0", f"train.init_from={tmp_path / 'G.pth'}"])
    torch.manual_seed(5)
    start = training.stage_network(config, 2)
    checkpoint.export_published(start, tmp_path / "G.pth")
    seen = {}
    monkeypatch.setattr(training, "fit", lambda run, stage, progress: seen.update(stage.generator.module.state_dict()))
    with pytest.raises(ConfigError):
        training.train(config, manifest, tmp_path / "run")
    assert all(torch.equal(seen[key], value) for key, value in start.state_dict().items())


def test_a_starting_point_that_does_not_fit_is_refused_before_training(finished, manifest, tmp_path):
    best = finished[1] / "checkpoints" / "best" / "model.safetensors"
    config = load_config(None, [*MICRO, f"train.init_from={best}"])
    with pytest.raises(DataError, match=r"set train.stage1.num_images=0"):
        training.train(config, manifest, tmp_path / "run")
    config = load_config(None, [*MICRO, f"train.vit_weights={tmp_path / 'none.npz'}"])
    with pytest.raises(DataError, match=r"none\.npz"):
        training.describe(config, manifest)
    assert not (tmp_path / "run").exists()


def test_a_run_that_stopped_before_its_first_checkpoint_can_be_corrected(finished, manifest, tmp_path):
    config, _ = finished
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {seed: 9}\n")
    short = load_config(None, [*MICRO, "train.stage2.num_images=0"])
    assert training.train(short, manifest, tmp_path / "run").is_file()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == short.model_dump(mode="json")
    with pytest.raises(ConfigError, match="another --run-dir"):
        training.train(config, manifest, tmp_path / "run")


def test_lsgan_and_l1_by_hand():
    scores = torch.tensor([[0.5, 2.0]])
    assert lsgan(scores, True).item() == pytest.approx((0.25 + 1.0) / 2)
    assert lsgan(scores, False).item() == pytest.approx((0.25 + 4.0) / 2)
    source, synthetic, target = (torch.full((1, 1, 4, 4), v) for v in (0.0, 0.5, 0.25))
    mean = lambda pair: pair.mean((1, 2, 3), keepdim=True)  # noqa: E731
    losses = generator_losses(source, synthetic, target, mean)
    assert losses["l1"].item() == pytest.approx(0.25) and losses["adversarial"].item() == pytest.approx(0.75**2)
    assert discriminator_loss(source, synthetic, target, mean).item() == pytest.approx((0.875**2 + 0.25**2) / 2)
    assert generator_losses(source, synthetic, target, None).keys() == {"l1"}
