"""One frozen tree of settings: defaults < one YAML file of differences < `--set a.b=c`.

Lengths and cadences are in images seen, never in steps or epochs, so that a change of batch size changes nothing else.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """A setting that the user must change; the command line exits with 2 and prints the message, which is one line."""


class Settings(BaseModel):
    """A branch of the tree: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class IntensitySettings(Settings):
    """How source and target values become [-1, 1]; see `data/intensity.py` for the rules."""

    source: Literal["window", "percentile", "uint8"] = "window"
    target: Literal["window", "percentile", "uint8"] = "window"


class DataSettings(Settings):
    """What is read from the manifest, and how its values are scaled."""

    window_hu: tuple[float, float] = (-1024.0, 3071.0)
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.5
    intensity: IntensitySettings = IntensitySettings()
    # Many-to-one: these sources of the manifest, in this order, are the input channels. Empty: one source a case.
    channels: tuple[str, ...] = ()
    # Training leaves out slices with a smaller share of pixels above the target's lower bound (air, no brain).
    min_foreground: Annotated[float, Field(ge=0, lt=1)] = 0.0
    flip: bool = True
    # Small random affine, the same for both images: the largest turn, and the largest shift as a share of the size.
    max_rotation_deg: Annotated[float, Field(ge=0, le=45)] = 0.0
    max_shift: Annotated[float, Field(ge=0, le=0.25)] = 0.0

    @field_validator("window_hu")
    @classmethod
    def _window_rises(cls, window_hu: tuple[float, float]) -> tuple[float, float]:
        if not window_hu[0] < window_hu[1]:
            raise ValueError("the lower bound must be below the upper one")
        return window_hu


class FusionSettings(Settings):
    """How a transformer block joins its two branches (`model/fusion.py`)."""

    kind: Literal["se", "concat"] = "se"
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

    @property
    def stride(self) -> int:
        """Pixels between two tokens: the input is padded to a multiple of it."""
        return 4 * 2**self.num_downsamples * self.patch_size


class StageSettings(Settings):
    """One of the two training stages; `num_images = 0` skips it."""

    num_images: NotNegative = 100_000
    learning_rate: Rate = 2e-4
    # The rate is constant until this share of the stage's images is seen, then falls in a straight line to zero.
    constant_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    adversarial_weight: Annotated[float, Field(ge=0)] = 1.0
    l1_weight: Annotated[float, Field(ge=0)] = 100.0


class TrainSettings(Settings):
    """How the network is trained."""

    size: tuple[Positive, Positive] = (256, 256)
    batch_size: Positive = 8
    seed: NotNegative = 0
    adam_betas: tuple[float, float] = (0.5, 0.999)
    discriminator_channels: Positive = 64
    # "auto" is bf16-mixed where the device computes in bf16, else 32-true.
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    save_every_images: Positive = 10_000
    validate_every_images: Positive = 10_000
    # Slices that one validation looks at, evenly spread over the validation cases.
    validation_slices: Positive = 64
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
        """`model.in_channels` follows `data.channels` where it is not stated."""
        data, model = tree.get("data") or {}, tree.get("model") or {}
        if isinstance(data, dict) and isinstance(model, dict) and isinstance(data.get("channels"), list | tuple):
            tree = {**tree, "model": {"in_channels": max(len(data["channels"]), 1), **model}}
        return tree

    @model_validator(mode="after")
    def _network_fits_the_data(self) -> "Config":
        if self.model.in_channels != max(len(self.data.channels), 1):
            raise ValueError(
                f"model.in_channels is {self.model.in_channels}, data.channels names {len(self.data.channels)}"
            )
        if self.model.out_channels != 1:
            raise ValueError(f"model.out_channels is {self.model.out_channels}, a manifest has one target")
        if self.train.identity_start and self.model.base_channels < 8:
            raise ValueError("train.identity_start needs model.base_channels of at least 8")
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
