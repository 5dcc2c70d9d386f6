"""One file that is enough to predict: weights plus a header; and importers for what others published.

Our file is safetensors. Its header rebuilds the network and says what it was trained on. Published files are generator
and PatchGAN `.pth` state dicts, and ImageNet ViT weights in `.npz`. Nothing is unpickled beyond plain tensors.
"""

import json
import os
import pickle
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import scipy.ndimage
import torch
from pydantic import ValidationError
from torch import nn

from seresvit import __version__
from seresvit.config import ConfigError, DataSettings, ModelSettings
from seresvit.data.volume import DataError, written_whole
from seresvit.model.discriminator import Discriminator
from seresvit.model.generator import Generator

Header = dict[str, Any]
State = dict[str, torch.Tensor]


class CheckpointError(DataError):
    """A weights file that cannot be used: the message names the file, what was found and what to do."""


def load(path: str | Path, device: str | torch.device = "cpu") -> Generator:
    """The network of a checkpoint in eval mode on `device`; its header stands in `net.header`.

    Raises CheckpointError: not a checkpoint of ours (the remedy names `seresvit convert`), of another kind, truncated,
    or with weights that do not fit its header.
    """
    state, header = read(path)
    if header["kind"] != "generator":
        raise CheckpointError(f"{path}: holds a {header['kind']}, not a generator; give the generator's file")
    try:
        network = Generator(ModelSettings.model_validate(header["model"]))
    except (KeyError, ValidationError, ValueError) as error:
        fault = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: its header does not describe a network ({fault})") from None
    fill(network, state, str(path))
    network.header = header
    return network.to(device).eval()


def save(network: nn.Module, path: str | Path, header: Header) -> None:
    """Write the weights and the header, with `kind`, package version and commit added, as one safetensors file.

    `header` of a generator: `data` (settings), `train_size`, `source_intensity`, `target_intensity`, `sources`,
    `target`. Raises DataError when the file cannot be written; an older file of that name is then still whole.
    """
    kind = "generator" if isinstance(network, Generator) else "discriminator"
    full = {"format": 1, "kind": kind, "version": __version__, "commit": commit(), **header}
    if isinstance(network, Generator):
        full["model"] = network.settings.model_dump(mode="json")
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    with written_whole(Path(path)) as temporary:
        try:
            safetensors.torch.save_file(state, temporary, metadata={"seresvit": json.dumps(full)})
        except safetensors.SafetensorError as error:  # it has the system's number in its words alone
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from None


def read(path: str | Path) -> tuple[State, Header]:
    """State dict and header of one of our files. Raises CheckpointError."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("seresvit", "null"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the path of a .safetensors checkpoint") from None
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        hint = "; import a published file with `seresvit convert`" if str(path).endswith((".pth", ".pt")) else ""
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}){hint}") from None
    if not isinstance(header, dict) or "kind" not in header:
        raise CheckpointError(f"{path}: a safetensors file without our header; it was not written by seresvit")
    return state, header


def fill(network: nn.Module, state: State, where: str) -> None:
    """Copy `state` into the network. Raises CheckpointError naming a missing, unexpected or misshapen key."""
    wanted = network.state_dict()
    for verb, keys in (("lacks", wanted.keys() - state.keys()), ("has the unexpected", state.keys() - wanted.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"{where}: {verb} {min(keys)}{more}; it is another network than its header says")
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            raise CheckpointError(f"{where}: {key} has shape {list(tensor.shape)}, expected {list(wanted[key].shape)}")
    network.load_state_dict(state)


def commit() -> str:
    """The git commit of the package's source, with + when it was changed since; empty outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip()


# Published key ↔ ours, for the parts of a generator. One table, read in both directions.
_PUBLISHED = [
    ("encoder_1.1.", "stem.conv."),
    ("encoder_1.2.", "stem.norm."),
    ("encoder_2.0.", "encode.0.conv."),
    ("encoder_2.1.", "encode.0.norm."),
    ("encoder_3.0.", "encode.1.conv."),
    ("encoder_3.1.", "encode.1.norm."),
    ("decoder_1.0.", "decode.0.conv."),
    ("decoder_1.1.", "decode.0.norm."),
    ("decoder_2.0.", "decode.1.conv."),
    ("decoder_2.1.", "decode.1.norm."),
    ("decoder_3.1.", "head.conv."),
    ("transformer_encoder.encoder_norm.", "transformer.norm."),
    ("transformer_encoder.layer.#.attention_norm.", "transformer.layers.#.attention_norm."),
    ("transformer_encoder.layer.#.ffn_norm.", "transformer.layers.#.mlp_norm."),
    ("transformer_encoder.layer.#.ffn.", "transformer.layers.#.mlp."),
    ("transformer_encoder.layer.#.attn.", "transformer.layers.#.attention."),
    *(
        (f"art_#.{kind}.{3 * stage + offset}.", f"art_#.{kind}.{stage}.{part}.")
        for kind in ("downsample", "upsample")
        for stage in range(5)
        for offset, part in enumerate(("conv", "norm"))
    ),
    ("art_#.embeddings.positional_encoding", "art_#.embed.position"),
    ("art_#.embeddings.patch_embeddings.", "art_#.embed.patch."),
    ("art_#.se.excitation.0.", "art_#.fuse.gate.reduce."),
    ("art_#.se.excitation.2.", "art_#.fuse.gate.expand."),
    ("art_#.cc.skip.0.", "art_#.compress.skip.conv."),
    ("art_#.cc.skip.1.", "art_#.compress.skip.norm."),
    ("art_#.cc.block.0.", "art_#.compress.body.0.conv."),
    ("art_#.cc.block.1.", "art_#.compress.body.0.norm."),
    ("art_#.cc.block.3.", "art_#.compress.body.1.conv."),
    ("art_#.cc.block.4.", "art_#.compress.body.1.norm."),
    ("art_#.residual_cnn.0.conv_block.1.", "art_#.residual.0.conv."),
    ("art_#.residual_cnn.0.conv_block.2.", "art_#.residual.0.norm."),
    ("art_#.residual_cnn.0.conv_block.5.", "art_#.residual.1.conv."),
    ("art_#.residual_cnn.0.conv_block.6.", "art_#.residual.1.norm."),
]


def _renamed(key: str, *, to_published: bool) -> str | None:
    """The key in the other naming, None when it has no place there."""
    for published, ours in _PUBLISHED:
        old, new = (ours, published) if to_published else (published, ours)
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)"), key)
        if match:
            return (new.replace("#", match[1]) if match.groups() else new) + key[match.end() :]
    return None


def import_published(path: str | Path) -> Generator:
    """The network of a published generator `.pth`, its geometry read from the shapes, in eval mode.

    The published file holds the shared encoder under up to three prefixes; they must agree. Its heads cannot be read
    from shapes and are taken as 64 wide, as in every published ViT. Raises CheckpointError naming the key at fault.
    """
    published = _read_pth(path)
    alias = re.compile(r"art_\d+\.transformer\.")
    state: State = {}
    for key, tensor in published.items():
        own = alias.sub("transformer_encoder.", key)
        if own != key and own in published:
            if not torch.equal(tensor, published[own]):
                raise CheckpointError(f"{path}: {key} differs from {own}, which it should share")
            continue
        name = _renamed(own, to_published=False)
        if name is None:
            raise CheckpointError(f"{path}: unexpected key {key}; not a ResViT generator as published")
        if name in state and not torch.equal(tensor, state[name]):
            raise CheckpointError(f"{path}: {key} differs from another copy of the shared encoder")
        state[name] = tensor
    network = Generator(_settings_of(state, str(path)))
    fill(network, state, str(path))
    return network.eval()


def export_published(network: Generator, path: str | Path) -> None:
    """Write the generator as the published code stores it: its keys, the shared encoder under every block's prefix."""
    if network.settings.norm != "batch":
        raise CheckpointError(f"{path}: the published layout has batch norm, this network {network.settings.norm} norm")
    fusion = network.settings.fusion.kind
    if fusion not in ("se", "concat") and network.settings.transformer_blocks:
        raise CheckpointError(f"{path}: the published layout has se and concat only, this fusion is {fusion}")
    inferred = _settings_of(network.state_dict(), str(path))
    if inferred.vit.heads != network.settings.vit.heads and network.settings.transformer_blocks:
        raise CheckpointError(
            f"{path}: the published layout takes heads as 64 wide, this network's are narrower or wider"
        )
    if inferred.token_grid != network.settings.token_grid and network.settings.transformer_blocks:
        raise CheckpointError(
            f"{path}: the published layout has square token grids, found {network.settings.token_grid}"
        )
    state: State = {}
    for key, tensor in network.state_dict().items():
        name = _renamed(key, to_published=True)
        if name is None:
            raise CheckpointError(f"{path}: {key} has no place in the published layout")
        state[name] = tensor
        for block in network.settings.transformer_blocks:
            if name.startswith("transformer_encoder."):
                state[name.replace("transformer_encoder", f"art_{block}.transformer", 1)] = tensor
    with written_whole(Path(path)) as temporary:
        torch.save(state, temporary)


def import_discriminator(path: str | Path) -> Discriminator:
    """The PatchGAN of a published `.pth`, in eval mode. Raises CheckpointError naming the key at fault."""
    state = _read_pth(path)
    if "model.0.weight" not in state:
        raise CheckpointError(f"{path}: lacks model.0.weight; not a PatchGAN as published")
    base_channels, in_channels = state["model.0.weight"].shape[:2]
    num_layers = sum(1 for tensor in state.values() if tensor.ndim == 4) - 2
    network = Discriminator(in_channels, base_channels, num_layers)
    fill(network, state, str(path))
    return network.eval()


def load_vit_npz(network: Generator, path: str | Path) -> None:
    """Put ImageNet ViT weights (the `.npz` of Dosovitskiy et al.) into the encoder and both blocks' embeddings.

    The class token is dropped and the position grid resized with `scipy.ndimage.zoom`, order 1. A 1×1 patch kernel is
    spread evenly over a p×p one, so that a token of a constant feature keeps its value; the published code copies it to
    every position, which multiplies such a token by p². The rest of the network is untouched.
    Raises CheckpointError naming an array that is missing or of the wrong shape.
    """
    try:
        arrays = dict(np.load(path, allow_pickle=False))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a readable .npz file ({error})") from None
    state: State = {}

    def take(array: str, key: str, shape: tuple[int, ...], transpose: bool = False) -> None:
        if array not in arrays:
            raise CheckpointError(f"{path}: lacks {array}; not an ImageNet ViT .npz that fits this network")
        if arrays[array].size != int(np.prod(shape)):
            raise CheckpointError(f"{path}: {array} has shape {list(arrays[array].shape)}, {key} needs {list(shape)}")
        value = arrays[array].reshape(shape[::-1] if transpose else shape)
        state[key] = torch.from_numpy(np.ascontiguousarray(value.T if transpose else value))

    vit = network.settings.vit
    width, hidden = vit.width, vit.mlp_width
    for layer in range(vit.depth):
        block, ours = f"Transformer/encoderblock_{layer}", f"transformer.layers.{layer}"
        for name in ("query", "key", "value", "out"):
            attention = f"{block}/MultiHeadDotProductAttention_1/{name}"
            take(f"{attention}/kernel", f"{ours}.attention.{name}.weight", (width, width), transpose=True)
            take(f"{attention}/bias", f"{ours}.attention.{name}.bias", (width,))
        for dense, name, shape in ((0, "fc1", (hidden, width)), (1, "fc2", (width, hidden))):
            take(f"{block}/MlpBlock_3/Dense_{dense}/kernel", f"{ours}.mlp.{name}.weight", shape, transpose=True)
            take(f"{block}/MlpBlock_3/Dense_{dense}/bias", f"{ours}.mlp.{name}.bias", shape[:1])
        for number, name in ((0, "attention_norm"), (2, "mlp_norm")):
            take(f"{block}/LayerNorm_{number}/scale", f"{ours}.{name}.weight", (width,))
            take(f"{block}/LayerNorm_{number}/bias", f"{ours}.{name}.bias", (width,))
    take("Transformer/encoder_norm/scale", "transformer.norm.weight", (width,))
    take("Transformer/encoder_norm/bias", "transformer.norm.bias", (width,))

    for number in network.settings.transformer_blocks:
        embed = getattr(network, f"art_{number}").embed
        ours = f"art_{number}.embed"
        take("embedding/bias", f"{ours}.patch.bias", (width,))
        state[f"{ours}.patch.weight"] = _patch_kernel(arrays, tuple(embed.patch.weight.shape), path)
        state[f"{ours}.position"] = _position_grid(arrays, embed.grid, width, path)
    network.load_state_dict(state, strict=False)


def _patch_kernel(arrays: dict[str, np.ndarray], shape: tuple[int, ...], path: str | Path) -> torch.Tensor:
    """The .npz patch kernel (row, column, in, out) as a convolution weight (out, in, row, column) of `shape`."""
    kernel = arrays["embedding/kernel"].transpose(3, 2, 0, 1) if "embedding/kernel" in arrays else np.empty(())
    if kernel.shape[:2] == shape[:2] and kernel.shape[2:] == (1, 1):
        kernel = np.broadcast_to(kernel / (shape[2] * shape[3]), shape)
    if kernel.shape != shape:
        raise CheckpointError(
            f"{path}: embedding/kernel has shape {list(kernel.shape)}, needed is {list(shape)} or 1×1"
        )
    return torch.from_numpy(np.array(kernel))


def _position_grid(arrays: dict[str, np.ndarray], grid: tuple[int, int], width: int, path: str | Path) -> torch.Tensor:
    """The .npz position vectors (1, 1 + n², D), class token dropped, resized to (1, rows·columns, D)."""
    name = "Transformer/posembed_input/pos_embedding"
    if name not in arrays:
        raise CheckpointError(f"{path}: lacks {name}; not an ImageNet ViT .npz")
    position = arrays[name][0, 1:]
    side = round(len(position) ** 0.5)
    if side * side != len(position) or position.shape[1] != width:
        raise CheckpointError(f"{path}: {name} has shape {list(arrays[name].shape)}, needed is [1, 1 + n², {width}]")
    square = position.reshape(side, side, width)
    resized = scipy.ndimage.zoom(square, (grid[0] / side, grid[1] / side, 1), order=1)
    return torch.from_numpy(resized.reshape(1, grid[0] * grid[1], width))


def _read_pth(path: str | Path) -> State:
    """The tensors of a `.pth` state dict, without the prefix that DataParallel adds. Raises CheckpointError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the path of a published .pth") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        fault = str(error).split("\n")[0][:120]
        raise CheckpointError(f"{path}: not a plain state dict ({fault}); nothing else is unpickled") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: not a state dict of tensors; save `model.state_dict()` and give that")
    return {str(key).removeprefix("module."): tensor for key, tensor in state.items()}


def _settings_of(state: State, where: str) -> ModelSettings:
    """What network a state dict in our naming belongs to, read from its shapes."""
    try:
        stem, head = state["stem.conv.weight"], state["head.conv.weight"]
        blocks = sorted(int(k[4:].split(".")[0]) for k in state if re.fullmatch(r"art_\d+\.embed\.position", k))
        tree: dict[str, Any] = {
            "in_channels": stem.shape[1],
            "out_channels": head.shape[0],
            "base_channels": stem.shape[0],
            "transformer_blocks": blocks,
        }
        if blocks:
            first = f"art_{blocks[0]}"
            patch, position = state[f"{first}.embed.patch.weight"], state[f"{first}.embed.position"]
            mlp = state["transformer.layers.0.mlp.fc1.weight"]
            side = round(position.shape[1] ** 0.5)
            gate = state.get(f"{first}.fuse.gate.reduce.weight")
            tree |= {
                "num_downsamples": len(
                    [k for k in state if re.fullmatch(rf"{first}\.downsample\.\d\.conv\.weight", k)]
                ),
                "patch_size": patch.shape[-1],
                "token_grid": (side, position.shape[1] // side),
                "vit": {
                    "depth": len([k for k in state if k.endswith(".mlp.fc1.weight")]),
                    "width": patch.shape[0],
                    "heads": max(patch.shape[0] // 64, 1),
                    "mlp_width": mlp.shape[0],
                },
                "fusion": {"kind": "concat"} if gate is None else {"reduction": gate.shape[1] // gate.shape[0]},
            }
    except KeyError as error:
        raise CheckpointError(
            f"{where}: lacks the weights that become {error.args[0]}; not a whole generator"
        ) from None
    return ModelSettings.model_validate(tree)


def convert(source: Path, out: Path, data: DataSettings) -> None:
    """Turn a published generator or PatchGAN `.pth` into our checkpoint, or our generator back into a published `.pth`.

    `data` goes into the header of an imported generator, whose file says nothing of its intensity rule.
    Raises CheckpointError for an unusable file, ConfigError when the two suffixes ask for neither.
    """
    if source.suffix in (".pth", ".pt") and out.suffix == ".safetensors":
        if "model.0.weight" in _read_pth(source):
            save(import_discriminator(source), out, {})
            return
        network = import_published(source)
        grid = network.settings.token_grid
        size = [side * network.settings.stride for side in grid] if grid else []
        save(network, out, {"data": data.model_dump(mode="json"), "train_size": size, "sources": [], "target": ""})
    elif source.suffix == ".safetensors" and out.suffix in (".pth", ".pt"):
        export_published(load(source), out)
    else:
        raise ConfigError(f"{source} → {out}: give .pth → .safetensors, or .safetensors → .pth, .onnx, .xml or BUNDLE/")
