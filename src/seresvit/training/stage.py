"""One stage of training: its networks and optimizers, where they start, how they are stopped and taken up again."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from seresvit.config import Config, ConfigError, StageSettings
from seresvit.model import checkpoint
from seresvit.model.discriminator import Discriminator
from seresvit.model.generator import Generator, start_as_identity
from seresvit.training import perceptual

MODEL, DISCRIMINATOR, STATE = "model.safetensors", "discriminator.safetensors", "state.pt"

Terms = dict[str, torch.Tensor]
# What `train.gradients` does and returns, as a CUDA graph.
Replay = Callable[..., tuple[Terms, list[torch.Tensor], list[torch.Tensor]]]


@dataclass
class Stage:
    """Everything that changes while one stage trains."""

    number: int
    settings: StageSettings
    generator: _FabricModule
    optimizer: _FabricOptimizer
    discriminator: _FabricModule
    discriminator_optimizer: _FabricOptimizer
    average: AveragedModel | None
    replay: Replay | None = None
    images: int = 0
    validated_at: int = -1
    best_mae: float = math.inf
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0

    @property
    def model(self) -> Generator:
        """The network that is validated and saved: the average of the weights, where one is kept."""
        network = self.average.module if self.average else self.generator.module
        assert isinstance(network, Generator)
        return network


COUNTERS = ("images", "validated_at", "best_mae", "bad_steps", "bad_steps_in_a_row")


def start_stage(fabric: Fabric, config: Config, number: int, last: Path | None) -> Stage:
    """A stage where its checkpoint left it; else with the weights of the stage before or of `train.init_from`."""
    settings: StageSettings = getattr(config.train, f"stage{number}")
    draw_from(config.train.seed, number)
    generator = stage_network(config, number)
    channels = config.model.in_channels + config.model.out_channels
    discriminator = Discriminator(channels, config.train.discriminator_channels)
    saved = read_state(last)
    if config.train.identity_start:
        start_as_identity(generator, config.data.context_slices)
    if last:
        take_weights(generator, last / MODEL)
        checkpoint.fill(discriminator, checkpoint.read(last / DISCRIMINATOR)[0], str(last / DISCRIMINATOR))
    elif config.train.init_from:
        take_weights(generator, Path(config.train.init_from))
    resumed = saved.get("stage") == number
    if number == 2 and config.train.vit_weights and not resumed:
        checkpoint.load_vit_npz(generator, config.train.vit_weights)
    freeze(generator, settings)
    # Convolutions of two to four dozen channels run faster so, on CPU and GPU alike.
    generator.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = averaged(generator, config) if config.train.ema_images else None
    if resumed and average:
        generator.load_state_dict(saved["generator"])
    stage = _set_up(fabric, config, number, generator, discriminator, average)
    if resumed:
        for name in COUNTERS:
            setattr(stage, name, saved[name])
        for name in ("optimizer", "discriminator_optimizer"):
            optimizer = getattr(stage, name)
            optimizer.load_state_dict(saved[name])
            _lay_out(optimizer)
        if average:
            average.n_averaged.fill_(saved["n_averaged"])
    return stage


def _set_up(
    fabric: Fabric, config: Config, number: int, generator: Generator, discriminator: Discriminator,
    average: AveragedModel | None,
) -> Stage:  # fmt: skip
    """The stage with its networks wrapped for their device, precision and processes."""
    settings: StageSettings = getattr(config.train, f"stage{number}")
    encoder = [p for name, p in generator.named_parameters() if p.requires_grad and name.startswith("transformer.")]
    others = [p for name, p in generator.named_parameters() if p.requires_grad and not name.startswith("transformer.")]
    rates = (settings.learning_rate, settings.vit_learning_rate or settings.learning_rate)

    def adam(parameters: list[list[torch.nn.Parameter]]) -> torch.optim.Adam:
        groups = [{"params": p, "lr": r, "initial_lr": r} for p, r in zip(parameters, rates, strict=False) if p]
        return torch.optim.Adam(groups, betas=config.train.adam_betas, fused=True)

    if fabric.world_size > 1 and fabric.device.type == "cuda":  # torch has no synchronised batch norm for the CPU
        generator, discriminator = map(torch.nn.SyncBatchNorm.convert_sync_batchnorm, (generator, discriminator))
    discriminator.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, discriminator_optimizer = adam([others, encoder]), adam([list(discriminator.parameters())])
    if config.train.compile:
        # All steps are of one size; symbolic sizes take the compiler many times as long.
        generator.compile(dynamic=False)
    wrapped = *fabric.setup(generator, optimizer), *fabric.setup(discriminator, discriminator_optimizer)
    return Stage(number, settings, *wrapped, average)  # type: ignore[call-arg]


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory layout of their weights: fused Adam goes through both value by value as they lie."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight).copy_(value)


def draw_from(*numbers: int) -> None:
    """Make what torch draws from now on a function of these numbers, so that no generator's state need be kept."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def write_stage(stage: Stage, header: checkpoint.Header, folder: Path) -> None:
    """Write all that makes the next step what it would have been: networks, optimizers, counters.

    The state of torch's generator is not among them: see `draw_from`.
    """
    state = {
        "stage": stage.number,
        **{name: getattr(stage, name) for name in COUNTERS},
        "optimizer": stage.optimizer.state_dict(),
        "discriminator_optimizer": stage.discriminator_optimizer.state_dict(),
    }
    if stage.average:  # the model is the average, its weights before averaging are state
        state |= {"generator": stage.generator.module.state_dict(), "n_averaged": stage.average.n_averaged.item()}
    header = {**header, "stage": stage.number, "images": stage.images}
    checkpoint.save(stage.model, folder / MODEL, header)
    checkpoint.save(stage.discriminator.module, folder / DISCRIMINATOR, header)
    with open(folder / STATE, "wb") as file:  # given a path, torch keeps from us what the system said of a failure
        torch.save(state, file)


def read_state(last: Path | None) -> dict[str, Any]:
    """What `write_stage` put beside the networks; empty where there is no checkpoint."""
    return torch.load(last / STATE, map_location="cpu", weights_only=True) if last else {}


def position(last: Path | None) -> tuple[int, int, bool]:
    """The stage and the images seen of a checkpoint, and whether its network was validated as it is there.

    (0, 0, True) where there is no checkpoint.
    """
    saved = read_state(last)
    return saved.get("stage", 0), saved.get("images", 0), not saved or saved["validated_at"] >= saved["images"]


def stage_network(config: Config, number: int) -> Generator:
    """The generator of a stage, freshly initialised: without transformers in stage 1."""
    blocks = config.model.transformer_blocks if number == 2 else ()
    return Generator(config.model.model_copy(update={"transformer_blocks": blocks, "token_grid": config.token_grid}))


def freeze(generator: Generator, settings: StageSettings) -> None:
    """Exempt the parts that `settings.freeze` names from training. Raises ConfigError for a name that is none."""
    for name in settings.freeze:
        try:
            generator.get_submodule(name).requires_grad_(False)
        except AttributeError:
            parts = ", ".join(part for part, _ in generator.named_children())
            raise ConfigError(f"freeze: the network of this stage has no part {name}; it has {parts}") from None
    if not any(parameter.requires_grad for parameter in generator.parameters()):
        raise ConfigError(f"freeze: {', '.join(settings.freeze)} is the whole network; leave a part to train")


def train_mode(stage: Stage) -> None:
    """Set the generator to train, except what is frozen: its statistics stand still, its dropout is off."""
    stage.generator.train()
    for name in stage.settings.freeze:
        stage.generator.module.get_submodule(name).eval()


def averaged(generator: Generator, config: Config) -> AveragedModel:
    """A copy of the generator that follows its weights and statistics with a half-life of `train.ema_images` images."""
    decay = 0.5 ** (config.train.batch_size / config.train.ema_images)
    return AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).eval()


def rate_factor(settings: StageSettings, images: int) -> float:
    """What the learning rates are multiplied by after that many images: 1, then falling to 0 at the stage's end."""
    seen = images / settings.num_images
    if seen < settings.constant_share:
        return 1.0
    left = (1 - seen) / (1 - settings.constant_share)
    return left if settings.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def take_weights(generator: Generator, path: Path) -> None:
    """Copy the weights of a checkpoint, ours or a published `.pth`, into a network that may have more than they fill.

    Raises CheckpointError naming a weight that has no place, or another shape, in the network.
    """
    source = checkpoint.import_published(path) if path.suffix in (".pth", ".pt") else checkpoint.load(path)
    blocks, wanted = source.settings.transformer_blocks, generator.settings.transformer_blocks
    if set(blocks) - set(wanted):
        raise checkpoint.CheckpointError(
            f"{path}: has transformers in blocks {blocks}, this stage in {wanted}; set train.stage1.num_images=0"
        )
    if blocks and source.settings.vit.heads != generator.settings.vit.heads:
        raise checkpoint.CheckpointError(f"{path}: set model.vit.heads={source.settings.vit.heads}, as it was trained")
    checkpoint.fill(generator, {**generator.state_dict(), **source.state_dict()}, str(path))


def check_starting_points(config: Config) -> None:
    """Raises CheckpointError when `train.init_from` or `train.vit_weights` will not fit the stage that takes them.

    And ConfigError when `freeze` names what a stage has not, or `perceptual_file` is none.
    """
    for number in (1, 2):
        settings: StageSettings = getattr(config.train, f"stage{number}")
        if settings.num_images and settings.freeze:
            with torch.device("meta"):
                freeze(stage_network(config, number), settings)
        if settings.num_images and settings.perceptual_weight:
            perceptual.load(settings.perceptual_file, torch.device("cpu"))
    if config.train.init_from:
        first = 1 if config.train.stage1.num_images else 2
        take_weights(stage_network(config, first), Path(config.train.init_from))
    if config.train.vit_weights and config.train.stage2.num_images:
        checkpoint.load_vit_npz(stage_network(config, 2), config.train.vit_weights)
