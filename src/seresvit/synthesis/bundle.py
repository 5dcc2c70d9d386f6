"""A checkpoint as a MONAI bundle: a folder that MONAI's own programs read, check and run.

The folder holds the weights as a plain state dict, what the network takes and gives (configs/metadata.json), and the
path from image file to image file (configs/inference.json), with the intensity rules of the training in it. To write it
takes no MONAI; to run it takes MONAI and this package, whose network it names.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from seresvit import __version__
from seresvit.config import DataSettings
from seresvit.data.intensity import Intensity, intensity_of
from seresvit.data.volume import DataError, Volume, written_whole
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.export import sha256_of

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
# What the tests ran it with.
TRIED_WITH = {"monai": "1.6.1", "nibabel": "5.4.2", "pytorch-ignite": "0.5.5"}
BATCH_SIZE = 8


def write_bundle(source: Path, out: Path) -> None:
    """Write the network of the checkpoint `source` as the MONAI bundle `out`, a new folder, whole or not at all.

    Raises CheckpointError for an unusable checkpoint, and DataError for a folder that is there already and for a
    training that a bundle cannot repeat: several channels, neighbouring slices, resampling, N4, 8-bit pictures, or an
    MR target whose scale the checkpoint does not record.
    """
    if out.exists():
        raise DataError(f"{out}: is there already; give the name of a new folder")
    network = checkpoint.load(source)
    data, target = _rules(network, source)
    facts = metadata(network, data, target, sha256_of(source))
    texts = {
        "configs/metadata.json": json.dumps(facts, indent=4),
        "configs/inference.json": json.dumps(inference(network, data, target), indent=4),
        "docs/README.md": _readme(facts),
        "LICENSE": _licence(),
    }
    with written_whole(out) as folder:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "models").mkdir()
        torch.save(network.state_dict(), folder / "models" / "model.pt")


def _rules(network: Generator, source: Path) -> tuple[DataSettings, Intensity]:
    """The data settings of the training and the rule that restores the target, both such that a bundle can say them."""
    try:
        data = DataSettings.model_validate(network.header["data"])
    except (KeyError, ValidationError):
        raise checkpoint.CheckpointError(f"{source}: its header lacks usable data settings; train it again") from None
    needs = {
        "several input channels": network.settings.in_channels > 1,
        f"data.resample={data.resample}": data.resample not in ("", "source"),
        "data.n4": data.n4,
        "8-bit pictures": "uint8" in (data.intensity.source, data.intensity.target),
    }
    if cannot := [name for name, is_needed in needs.items() if is_needed]:
        raise DataError(f"{source}: a bundle cannot repeat {' and '.join(cannot)}; use seresvit predict or serve")
    if recorded := network.header.get("target_intensity"):
        return data, Intensity.from_dict(recorded)
    if data.intensity.target == "window":
        return data, Intensity("window", *data.window_hu, "HU")
    raise DataError(f"{source}: its header does not record the scale of the target; use seresvit predict or serve")


def inference(network: Generator, data: DataSettings, target: Intensity) -> dict[str, Any]:
    """configs/inference.json: from every NIfTI file in `dataset_dir` to one of its name in `output_dir`.

    Axes of the image tensor: channel, then row, column and slice as the network saw them in training (P, L, S).
    """
    image, pred = {"keys": "image"}, {"keys": "pred"}
    restored = {"b_min": target.low, "b_max": target.high}
    preprocessing = [
        {"_target_": "LoadImaged", **image, "reader": "NibabelReader", "ensure_channel_first": False},
        {"_target_": "EnsureChannelFirstd", **image, "channel_dim": "no_channel"},
        {"_target_": "Orientationd", **image, "axcodes": "PLS", "labels": None},
        _scaling(data),
        {"_target_": "EnsureTyped", **image, "dtype": "$torch.float32"},
    ]
    postprocessing = [
        {"_target_": "Invertd", **pred, "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False},
        {"_target_": "ScaleIntensityRanged", **pred, "a_min": -1, "a_max": 1, **restored},
        {
            "_target_": "SaveImaged",
            **pred,
            "output_dir": "@output_dir",
            "output_postfix": "synthetic",
            "output_dtype": "$numpy.float32",
            "resample": False,
            "separate_folder": False,
        },
    ]
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/synthetic'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii*'))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "seresvit.model.generator.Generator",
            "settings": {"_target_": "seresvit.config.ModelSettings", **network.settings.model_dump(mode="json")},
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        # All of a slice at once, slice by slice.
        "inferer": {
            "_target_": "SliceInferer",
            "roi_size": [-1, -1],
            "spatial_dim": 2,
            "sw_batch_size": BATCH_SIZE,
            "overlap": 0,
        },
        "postprocessing": {"_target_": "Compose", "transforms": postprocessing},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _scaling(data: DataSettings) -> dict[str, Any]:
    """The transform that scales a source to [-1, 1] as the training did."""
    if data.intensity.source == "window":
        low, high = data.window_hu
        bounds = {"a_min": low, "a_max": high, "b_min": -1, "b_max": 1, "clip": True}
        return {"_target_": "ScaleIntensityRanged", "keys": "image", **bounds}
    rule = {
        "kind": data.intensity.source,
        "percentile": data.percentile,
        "zscore_limit": data.zscore_limit,
    }
    function = {"_target_": "seresvit.synthesis.bundle.scaled_by_foreground", "_mode_": "callable", **rule}
    return {"_target_": "Lambdad", "keys": "image", "func": function}


def scaled_by_foreground(image: Any, kind: str, percentile: float, zscore_limit: float) -> Any:
    """An MR image, a tensor of any axes, in [-1, 1] by the rule of that kind: what inference.json calls for MR sources.

    MR has no unit, so that the bounds are each image's own, taken from its foreground. Raises DataError for an image
    without any.
    """
    array = image.numpy().astype(np.float32).reshape(image.shape[-3:])
    path = Path(str(getattr(image, "meta", {}).get("filename_or_obj", "image")))
    volume = Volume(array, np.eye(4), np.arange(float(len(array))), "arbitrary", path, "nifti")
    rule = intensity_of(volume, kind, DataSettings(percentile=percentile, zscore_limit=zscore_limit))
    middle, reach = (rule.low + rule.high) / 2, (rule.high - rule.low) / 2
    return ((image.float() - middle) / reach).clamp(-1, 1)


def metadata(network: Generator, data: DataSettings, target: Intensity, checkpoint_sha256: str) -> dict[str, Any]:
    """configs/metadata.json, by MONAI's schema; and under `seresvit` the header of the checkpoint."""
    header, version = network.header, network.header.get("version", __version__)
    source, made = ("CT" if kind == "window" else "MR" for kind in (data.intensity.source, target.kind))
    name = header.get("target") or "target"
    scaled = {
        "type": "image",
        "format": "magnitude",
        "num_channels": 1,
        # Any size from 2 pixels works; these need no padding, and MONAI's check tries the smallest one.
        "spatial_shape": [f"{network.settings.stride}*n"] * 2,
        "dtype": "float32",
        "value_range": [-1, 1],
        "is_patch_data": False,
    }
    restored = {
        **scaled,
        "format": "hounsfield" if target.unit == "HU" else "magnitude",
        "modality": made,
        "spatial_shape": ["*", "*", "*"],
        "value_range": [target.low, target.high],
        "channel_def": {"0": f"synthetic {name} in {target.unit}"},
    }
    return {
        "schema": SCHEMA,
        "version": version,
        "changelog": {version: f"made from the checkpoint with SHA-256 {checkpoint_sha256}"},
        "monai_version": TRIED_WITH["monai"],
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {
            "seresvit": __version__,
            **{package: number for package, number in TRIED_WITH.items() if package != "monai"},
        },
        "name": "SE-ResViT",
        "task": f"Synthesis of {name} from {' or '.join(header.get('sources', [])) or 'another image'}, slice by slice",
        "description": (
            "SE-ResViT turns a medical image into another one that was not acquired. Its images are computed: they can "
            "leave out what is there and show what is not."
        ),
        "authors": "not stated; state who trained this network",
        "copyright": "not stated; state the terms of these weights",
        "data_source": "not stated; state what this network was trained on",
        "data_type": "nibabel",
        "image_classes": f"one slice of a {source} image, scaled to [-1, 1]",
        "pred_classes": f"the same slice of a synthetic {made} image, in [-1, 1]",
        "intended_use": "Research. Not a medical device: not for diagnosis, not for treatment.",
        "references": [
            "O. Dalmaz, M. Yurt, T. Çukur. ResViT: Residual Vision Transformers for Multimodal Medical Image "
            "Synthesis. IEEE Transactions on Medical Imaging 41(10), 2022. doi:10.1109/TMI.2022.3167808",
            "J. Hu, L. Shen, G. Sun. Squeeze-and-Excitation Networks. CVPR 2018. doi:10.1109/CVPR.2018.00745",
        ],
        "network_data_format": {
            "inputs": {"image": {**scaled, "modality": source, "channel_def": {"0": "source"}}},
            "outputs": {"pred": {**scaled, "modality": made, "channel_def": {"0": f"synthetic {name}"}}},
            "post_processed_outputs": {"pred": restored},
        },
        "checkpoint_sha256": checkpoint_sha256,
        "seresvit": header,
    }


def _readme(facts: dict[str, Any]) -> str:
    """docs/README.md of the bundle."""
    restored = facts["network_data_format"]["post_processed_outputs"]["pred"]
    low, high = restored["value_range"]
    return f"""# SE-ResViT: {restored["channel_def"]["0"]}

{facts["task"]}. A MONAI bundle of the checkpoint with SHA-256 `{facts["checkpoint_sha256"]}`.

**{facts["intended_use"]}** {facts["description"]}

```bash
pip install "seresvit=={__version__}" "monai[fire,ignite,nibabel]>=1.5.1"
python -m monai.bundle run --bundle_root BUNDLE --config_file BUNDLE/configs/inference.json \\
  --meta_file BUNDLE/configs/metadata.json --dataset_dir IMAGES --output_dir SYNTHETIC
```

Every NIfTI file (`.nii`, `.nii.gz`) in the folder IMAGES becomes `NAME_synthetic.nii.gz` in the folder SYNTHETIC, on
its own grid, with values from {low:g} to {high:g}. Intensities are scaled and restored as in training; the rule is in
`configs/inference.json`. MONAI executes what that file names: run no bundle that you do not trust.

The bundle does not do what `seresvit predict` does beside predicting: it does not warn of a source that is unlike the
training, does not refuse values of another unit, and writes no derived DICOM. It runs in float32 with PyTorch.

`authors`, `copyright` and `data_source` in `configs/metadata.json` are not known to the program that wrote this: state
them before you pass the bundle on. `LICENSE` is that of the software; the terms of the weights depend on the data that
they were trained on.
"""


def _licence() -> str:
    """The licence of this package, from beside its installed metadata or from its checkout."""
    text = importlib.metadata.distribution("seresvit").read_text("licenses/LICENSE")
    return text or (Path(__file__).parents[3] / "LICENSE").read_text(encoding="utf-8")
