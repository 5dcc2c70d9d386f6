"""One frozen tree of settings: defaults < one YAML file of differences < `--set a.b=c`.

Lengths and cadences are in images seen, never in steps or epochs, so that a change of batch size changes nothing else.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Interpolation = Literal["nearest", "linear", "bspline"]
Weight = Annotated[float, Field(ge=0)]


def _rises(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise ValueError("the lower bound must be below the upper one")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_rises)]


def _named_or_spaced(resample: Any) -> Any:
    if resample in ("", "target", "source"):
        return resample
    spacing_mm = [resample] * 3 if isinstance(resample, int | float) else resample
    if not isinstance(spacing_mm, list | tuple) or len(spacing_mm) not in (2, 3):
        raise ValueError("expected target, source or a spacing in mm: one number, [row, column] or three numbers")
    if not all(type(mm) in (int, float) and 0.01 <= mm < 100 for mm in spacing_mm):
        raise ValueError("a spacing in mm is above 0.01 and below 100")
    return tuple(map(float, spacing_mm))


def _named_by_text(weights: Any) -> Any:
    """YAML reads a label's number as one, and takes it for another key than its text."""
    return {str(name): weight for name, weight in weights.items()} if isinstance(weights, dict) else weights


# The grid of all images of a patient; see `DataSettings.resample`.
Resample = Annotated[Literal["", "target", "source"] | tuple[float, ...], BeforeValidator(_named_or_spaced)]


class ConfigError(ValueError):
    """A setting that the user must change; the command line exits with 2 and prints the message, which is one line."""


class Settings(BaseModel):
    """A branch of the tree: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class IntensitySettings(Settings):
    """How source and target values become [-1, 1]; see `data/intensity.py` for the rules."""

    source: Literal["window", "percentile", "zscore", "uint8"] = "window"
    target: Literal["window", "percentile", "zscore", "uint8"] = "window"


class AugmentSettings(Settings):
    """How training changes the source alone, for images of other scanners; see `data/augmentation.py`."""

    kind: Literal["none", "mr", "ct"] = "none"
    # How often an image gets each change, and how large the changes are: 0.5 halves every range.
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    strength: Annotated[float, Field(ge=0, le=2)] = 1.0


class DataSettings(Settings):
    """What is read from the manifest, and how its values are scaled."""

    window_hu: Range = (-1024.0, 3071.0)
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.5
    # The rule "zscore" maps this many standard deviations to either side of the foreground's mean to -1..1.
    zscore_limit: Rate = 4.0
    intensity: IntensitySettings = IntensitySettings()
    # Take N4's bias field from MR sources, in training and prediction alike; targets stay as they were acquired.
    n4: bool = False
    # Set what lies outside the manifest's mask to the background in source and target.
    mask_background: bool = False
    # The grid of all images of a patient: "" demands one, "target" or "source" names whose, and millimetres (one
    # number; row, column; or slice, row, column) give the source's grid another spacing.
    resample: Resample = ""
    interpolation: Literal["linear", "bspline"] = "linear"
    # Many-to-one: these sources of the manifest, in this order, are the input channels. Empty: one source a case.
    channels: tuple[str, ...] = ()
    # 2.5-D: this many slices on either side are input channels too; beyond the last slice stands the last one again.
    context_slices: NotNegative = 0
    # Training leaves out slices with a smaller share of pixels above the target's lower bound (air, no brain).
    min_foreground: Annotated[float, Field(ge=0, lt=1)] = 0.0
    flip: bool = True
    # Small random affine, the same for both images: the largest turn, the largest shift as a share of the size, and the
    # largest share by which they grow or shrink.
    max_rotation_deg: Annotated[float, Field(ge=0, le=45)] = 0.0
    max_shift: Annotated[float, Field(ge=0, le=0.25)] = 0.0
    max_scale: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    augment: AugmentSettings = AugmentSettings()

    @model_validator(mode="after")
    def _augmentation_fits_the_source(self) -> "DataSettings":
        kind, fitting = self.augment.kind, {"mr": ("percentile", "uint8"), "ct": ("window",)}
        if kind != "none" and self.intensity.source not in fitting[kind]:
            raise ValueError(f"augment.kind={kind} is for intensity.source={' or '.join(fitting[kind])}")
        return self


class FusionSettings(Settings):
    """How a transformer block joins its two branches (`model/fusion.py`)."""

    kind: Literal[
        "concat", "se", "se-frozen", "scse", "cbam", "eca", "gct", "sk", "aff", "attention-gate", "spatial-se"
    ] = "se"
    # What the width of a bottleneck is divided by; eca and gct have none.
    reduction: Positive = 16


class VitSettings(Settings):
    """The shared encoder; the defaults are ViT-B."""

    depth: Positive = 12
    width: Positive = 768
    heads: Positive = 12
    mlp_width: Positive = 3072
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "VitSettings":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class ModelSettings(Settings):
    """Everything that rebuilds the network; stored in every checkpoint."""

    in_channels: Positive = 1
    out_channels: Positive = 1
    base_channels: Positive = 64
    num_downsamples: Positive = 2
    patch_size: Literal[1, 2, 4] = 1
    # Blocks 1..9 that carry a transformer and a gate; none at all is the stage-1 network.
    transformer_blocks: tuple[Annotated[int, Field(ge=1, le=9)], ...] = (1, 6)
    # Rows and columns of the learned position grid; None takes them from train.size.
    token_grid: tuple[Positive, Positive] | None = None
    vit: VitSettings = VitSettings()
    fusion: FusionSettings = FusionSettings()
    # Over the whole batch, as published; over each image and channel alone; or over groups of channels of an image.
    norm: Literal["batch", "instance", "group"] = "batch"

    @property
    def stride(self) -> int:
        """Pixels between two tokens: the input is padded to a multiple of it."""
        return 4 * 2**self.num_downsamples * self.patch_size


class TissueWeight(Settings):
    """Pixels whose target lies within `hu` count `weight` times as much as others."""

    hu: Range
    weight: Rate


class StageSettings(Settings):
    """One of the two training stages; `num_images = 0` skips it."""

    num_images: NotNegative = 100_000
    learning_rate: Rate = 2e-4
    # That of the transformer encoder, when it shall differ.
    vit_learning_rate: Rate | None = None
    # The rate is constant until this share of the stage's images is seen, then falls to zero: in a straight line, or as
    # half a cosine wave.
    constant_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    schedule: Literal["linear", "cosine"] = "linear"
    # Parts of the generator that keep their weights, named as in its state dict: transformer, stem, art_1.embed.
    freeze: tuple[str, ...] = ()
    # What is minimised: the sum of these terms times their weights (`training/losses.py`); 0 leaves a term out.
    adversarial: Literal["lsgan", "hinge", "bce"] = "lsgan"
    adversarial_weight: Weight = 1.0
    l1_weight: Weight = 100.0
    ms_ssim_weight: Weight = 0.0
    gradient_weight: Weight = 0.0
    perceptual_weight: Weight = 0.0
    # The user's file of VGG-16 weights for the perceptual term (`training/perceptual.py`).
    perceptual_file: str = ""
    # Tissues that count more than others in L1; where ranges overlap, the first one holds.
    tissue_weights: tuple[TissueWeight, ...] = ()
    # Labels of the manifest's mask that count more than other pixels in L1, by name (of labels.json; without it "mask"
    # is all that is marked) or number.
    mask_weights: Annotated[dict[str, Rate], BeforeValidator(_named_by_text)] = {}

    @model_validator(mode="after")
    def _terms_can_be_computed(self) -> "StageSettings":
        weights = (self.adversarial_weight, self.l1_weight, self.ms_ssim_weight, self.gradient_weight)
        if not any(weights) and not self.perceptual_weight:
            raise ValueError("every loss weight is 0: nothing to minimise")
        if self.perceptual_weight and not self.perceptual_file:
            raise ValueError("perceptual_weight needs perceptual_file, a file of VGG-16 weights")
        return self


class TrainSettings(Settings):
    """How the network is trained."""

    size: tuple[Positive, Positive] = (256, 256)
    # Images of one step, of all processes together; each process takes its share in `accumulate` parts, one at a time.
    batch_size: Positive = 8
    accumulate: Positive = 1
    seed: NotNegative = 0
    adam_betas: tuple[float, float] = (0.5, 0.999)
    discriminator_channels: Positive = 64
    # "auto" is bf16-mixed where the device computes in bf16, else 32-true.
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    # The largest norm of a gradient; longer ones are shortened to it. 0: none is.
    clip_norm: Weight = 0.0
    # An average of the generator's weights is validated and saved in their place: a step counts half as much after this
    # many images. 0: no average.
    ema_images: NotNegative = 0
    # Steps whose gradient is not finite are skipped; this many in a row end the run.
    max_bad_steps: Positive = 10
    # On a single GPU, record the gradients of a step once and replay them: hundreds of launches become one.
    cuda_graph: bool = True
    # torch.compile the generator: minutes at the start, faster steps after them.
    compile: bool = False
    # Draw every source, and within it every patient, equally often, however many slices they have.
    balance: bool = False
    # The share of slices that are drawn in proportion to the foreground that they show, and of crops (where `size` is
    # smaller than the image) whose centre lies on foreground.
    foreground_bias: Annotated[float, Field(ge=0, le=1)] = 0.0
    save_every_images: Positive = 10_000
    validate_every_images: Positive = 10_000
    # Slices that one validation looks at, evenly spread over the validation cases.
    validation_slices: Positive = 64
    # Log to this project of Weights & Biases too; WANDB_MODE=offline needs no network.
    wandb_project: str = ""
    # Begin as a network that returns its source; see `start_as_identity` in model/generator.py.
    identity_start: bool = False
    # Starting points: a checkpoint (or published .pth) for the first stage that is trained, ImageNet ViT weights (.npz)
    # for stage 2. A checkpoint with transformers needs stage1.num_images = 0.
    init_from: str = ""
    vit_weights: str = ""
    stage1: StageSettings = StageSettings()
    stage2: StageSettings = StageSettings(learning_rate=1e-4)

    @field_validator("size", mode="before")
    @classmethod
    def _one_number_is_square(cls, size: Any) -> Any:
        return (size, size) if isinstance(size, int) else size


class Config(Settings):
    """The whole tree."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """`model.in_channels` follows `data.channels` and `data.context_slices` where it is not stated."""
        data, model = tree.get("data") or {}, tree.get("model") or {}
        if isinstance(data, dict) and isinstance(model, dict):
            channels, context = data.get("channels") or (), data.get("context_slices") or 0
            if isinstance(channels, list | tuple) and isinstance(context, int):
                tree = {**tree, "model": {"in_channels": max(len(channels), 1) * (2 * context + 1), **model}}
        return tree

    @model_validator(mode="after")
    def _network_fits_the_data(self) -> "Config":
        if self.model.in_channels != max(len(self.data.channels), 1) * (2 * self.data.context_slices + 1):
            raise ValueError(
                f"model.in_channels is {self.model.in_channels}, data.channels names {len(self.data.channels)} "
                f"and data.context_slices is {self.data.context_slices}; leave model.in_channels out"
            )
        if self.model.out_channels != 1:
            raise ValueError(f"model.out_channels is {self.model.out_channels}, a manifest has one target")
        if self.train.identity_start and self.model.base_channels < 8:
            raise ValueError("train.identity_start needs model.base_channels of at least 8")
        return self

    @model_validator(mode="after")
    def _losses_fit_the_data(self) -> "Config":
        for name, stage in (("stage1", self.train.stage1), ("stage2", self.train.stage2)):
            if stage.tissue_weights and self.data.intensity.target != "window":
                raise ValueError(f"train.{name}.tissue_weights are for a target in HU (data.intensity.target=window)")
            if stage.ms_ssim_weight and min(self.train.size) < 11:
                raise ValueError(f"train.{name}.ms_ssim_weight needs a train.size of at least 11, the SSIM window")
            if stage.adversarial_weight and min(self.train.size) < 24:
                raise ValueError(
                    f"train.{name}.adversarial_weight needs a train.size of at least 24, for the discriminator"
                )
        return self

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the position grid: the configured ones, else those of a `train.size` image."""
        height, width = (-(-n // self.model.stride) for n in self.train.size)
        return self.model.token_grid or (height, width)


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The settings of the YAML file at `path` (None: the defaults), changed by `overrides` of the form `a.b=value`.

    Values of overrides are read as YAML, so that `train.size=[192,256]` and `model.fusion.kind=concat` both work.
    Raises ConfigError: no such file, not YAML, an unknown key (the nearest known one is named), a value out of range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8 text; save the YAML file as UTF-8") from None
        try:
            tree = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected 'key: value' lines at the top, found {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected a.b=value")
        branch = tree
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            if not isinstance(branch.setdefault(parent, {}), dict):
                raise ConfigError(f"--set {override}: {parent} is a value, not a group of settings")
            branch = branch[parent]
        try:
            branch[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(
                f"--set {override}: the value is not valid YAML; is a bracket or quote missing?"
            ) from None
    return from_tree(tree, str(path or "--set"))


def from_tree(tree: dict[str, Any], where: str) -> Config:
    """The settings that a nested dictionary states; `where` names its origin in the error. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_fault(error)}") from None


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML text; reading it back gives an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _first_fault(error: ValidationError) -> str:
    """One line for the first thing wrong, with the nearest known key where a key is unknown."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _known_keys(Config), n=1, cutoff=0.5)
        return f"unknown setting {key}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key or 'settings'}: {fault['msg']}, found {fault['input']!r}"[:300]


def _known_keys(branch: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in branch.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, prefix + name + ".")
    return keys


def shipped_config(name: str) -> Path:
    """The path of a YAML file that comes with the package: in configs/ of a checkout, or beside the installed code."""
    installed = Path(__file__).parent / "configs" / name
    return installed if installed.is_file() else Path(__file__).parents[2] / "configs" / name
