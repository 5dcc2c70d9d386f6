"""One stage: its rates, what it freezes, what it averages, and starting points that do not fit."""

import pytest
import torch
from lightning_fabric import Fabric

from seresvit.config import ConfigError, load_config
from seresvit.data.volume import DataError
from seresvit.model import checkpoint
from seresvit.training.stage import (
    averaged,
    check_starting_points,
    rate_factor,
    stage_network,
    start_stage,
    train_mode,
    write_stage,
)


@pytest.mark.parametrize(
    "schedule, wanted",
    # A cosine schedule as torch.optim.lr_scheduler.CosineAnnealingLR(T_max=50) has it after 0, 25 and 49 steps.
    [("linear", [1.0, 1.0, 1.0, 0.5, 0.02]), ("cosine", [1.0, 1.0, 1.0, 0.5, 0.000986636])],
)
def test_rates_are_constant_then_fall_to_zero(schedule, wanted):
    stage = load_config(
        None, [f"train.stage1={{num_images: 100, constant_share: 0.5, schedule: {schedule}}}"]
    ).train.stage1
    assert [rate_factor(stage, images) for images in (0, 49, 50, 75, 99)] == pytest.approx(wanted, rel=1e-5)


def test_the_encoder_has_a_rate_of_its_own_and_what_is_frozen_stays(micro):
    config = load_config(None, [*micro, "train.stage2.freeze=[stem, art_1]"])
    stage = start_stage(Fabric(accelerator="cpu"), config, 2, None)
    train_mode(stage)
    network = stage.generator.module
    rates = {id(p): group["lr"] for group in stage.optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        frozen = name.startswith(("stem.", "art_1."))
        assert parameter.requires_grad is not frozen
        wanted = None if frozen else 0.001 if name.startswith("transformer.") else 0.002
        assert rates.get(id(parameter)) == wanted
    assert not network.stem.norm.training and network.head.training


def test_freezing_what_is_not_there_or_everything_is_refused(micro):
    with pytest.raises(ConfigError, match=r"no part encoder; it has stem, encode"):
        check_starting_points(load_config(None, [*micro, "train.stage1.freeze=[encoder]"]))
    every = "stem,encode,decode,head," + ",".join(f"art_{n}" for n in range(1, 10))
    with pytest.raises(ConfigError, match="whole network"):
        check_starting_points(load_config(None, [*micro, f"train.stage1.freeze=[{every}]"]))


def test_an_average_forgets_half_in_its_half_life(micro):
    config = load_config(None, [*micro, "train.ema_images=10", "train.batch_size=2"])
    network = stage_network(config, 1)
    average = averaged(network, config)
    with torch.no_grad():
        network.head.conv.bias.fill_(1.0)
        average.update_parameters(network)  # the first is copied
        network.head.conv.bias.fill_(3.0)
        for _ in range(5):
            average.update_parameters(network)
    assert average.module.head.conv.bias.item() == pytest.approx(2.0)


def test_a_starting_point_that_does_not_fit_is_refused(micro, tmp_path):
    whole = load_config(None, micro)
    checkpoint.save(stage_network(whole, 2), tmp_path / "whole.safetensors", {})
    with pytest.raises(DataError, match=r"set train.stage1.num_images=0"):
        check_starting_points(load_config(None, [*micro, f"train.init_from={tmp_path / 'whole.safetensors'}"]))
    with pytest.raises(DataError, match=r"none\.npz"):
        check_starting_points(load_config(None, [*micro, f"train.vit_weights={tmp_path / 'none.npz'}"]))
    perceptual = f"train.stage2={{num_images: 2, perceptual_weight: 1, perceptual_file: {tmp_path / 'none.pth'}}}"
    with pytest.raises(ConfigError, match=r"none\.pth: cannot be read"):
        check_starting_points(load_config(None, [*micro, perceptual]))


def test_moments_take_the_memory_layout_of_their_weights(micro, tmp_path):
    """A checkpoint of a version that laid weights out otherwise must not be taken up value by wrong value."""
    config, fabric = load_config(None, micro), Fabric(accelerator="cpu", devices=1)
    stage = start_stage(fabric, config, 2, None)
    stage.images = 2
    for network, optimizer in (
        (stage.generator, stage.optimizer),
        (stage.discriminator, stage.discriminator_optimizer),
    ):
        for weight in network.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    (tmp_path / "last").mkdir()
    write_stage(stage, {}, tmp_path / "last")
    saved = torch.load(tmp_path / "last" / "state.pt")
    for name in ("optimizer", "discriminator_optimizer"):
        for moments in saved[name]["state"].values():
            moments.update({key: value.contiguous() for key, value in moments.items()})
    torch.save(saved, tmp_path / "last" / "state.pt")
    resumed = start_stage(fabric, config, 2, tmp_path / "last")
    for optimizer, wanted in (
        (resumed.optimizer, stage.optimizer),
        (resumed.discriminator_optimizer, stage.discriminator_optimizer),
    ):
        pairs = list(zip(optimizer.state.items(), wanted.state.values(), strict=True))
        assert len(pairs) > 10
        for (weight, moments), before in pairs:
            for name in ("exp_avg", "exp_avg_sq"):
                assert moments[name].stride() == weight.stride() and torch.equal(moments[name], before[name])
