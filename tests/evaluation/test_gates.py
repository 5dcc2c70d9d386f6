"""Gate shares from a small random network on simulated patients, against what torch and scipy make of them."""

import json

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy.stats import spearmanr

from seresvit.config import ConfigError, DataSettings, FusionSettings, ModelSettings, VitSettings
from seresvit.data.pairing import Case, write_manifest
from seresvit.data.phantom import simulate
from seresvit.evaluation.explain import explain, render_table
from seresvit.evaluation.gates import correlations, gate_table, movement
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predictor import Predictor

VIT = VitSettings(depth=1, width=32, heads=2, mlp_width=32)
PATIENTS = ("P001", "P002", "P003")


def write_checkpoint(path, kind="se"):
    torch.manual_seed(0)
    settings = ModelSettings(base_channels=4, token_grid=(3, 3), vit=VIT, fusion=FusionSettings(kind=kind))
    network = Generator(settings)
    for name, parameter in network.named_parameters():
        if ".fuse.gate." in name:  # gates that differ from 0.5 and between images
            torch.nn.init.normal_(parameter, std=1.0)
    checkpoint.save(network, path, {"data": DataSettings().model_dump(mode="json"), "run": "demo"})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three simulated patients of four slices from 90 and 110 to 70 keV, P001 for training, and a checkpoint."""
    root = tmp_path_factory.mktemp("gates")
    simulate(root / "images", patients=3, slices=4, size=48, kev=(70, 90, 110))
    for name, has_labels in (("manifest.csv", True), ("unlabelled.csv", False)):
        cases = [
            Case(
                patient,
                "train" if patient == "P001" else "test",
                source,
                "70keV",
                root / "images" / source / patient,
                root / "images" / "70keV" / patient,
                root / "images" / "labels" / f"{patient}.nii.gz" if has_labels else None,
            )
            for patient in PATIENTS
            for source in ("90keV", "110keV")
        ]
        write_manifest(cases, root / name)
    write_checkpoint(root / "se.safetensors")
    write_checkpoint(root / "concat.safetensors", "concat")
    return root


@pytest.fixture(scope="module")
def explained(folder):
    return explain(
        Predictor(folder / "se.safetensors", "cpu"), folder / "manifest.csv", folder / "out", knock_out=False
    )


def test_shares_are_the_means_of_the_gate_that_the_squeeze_sees(folder, explained):
    """The gate formed by hand from what reaches the fusion: sigmoid(W2 relu(W1 mean)), of one slice."""
    network = checkpoint.load(folder / "se.safetensors")
    plane = pydicom.dcmread(sorted((folder / "images" / "110keV" / "P002").glob("*.dcm"))[2])
    hu = plane.pixel_array * float(plane.RescaleSlope) + float(plane.RescaleIntercept)
    seen = {}
    for block in ("art_1", "art_6"):
        getattr(network, block).fuse.register_forward_pre_hook(lambda _, x, block=block: seen.update({block: x[0]}))
    with torch.inference_mode():
        network(torch.from_numpy((np.clip(hu, -1024, 3071) + 1024) / 4095 * 2 - 1).float()[None, None])
    images = explained.images
    row = images[(images.patient == "P002") & (images.source == "110keV") & (images.slice == 2)].iloc[0]
    for block in ("art_1", "art_6"):
        gate = getattr(network, block).fuse.gate
        scores = torch.relu(seen[block].mean((2, 3)) @ gate.reduce.weight.T) @ gate.expand.weight.T
        values = (1 / (1 + np.exp(-scores.detach().double().numpy())))[0]
        assert len(values) == 32
        assert row[f"{block}_transformer"] == pytest.approx(values[:16].mean(), abs=1e-5)
        assert row[f"{block}_cnn"] == pytest.approx(values[16:].mean(), abs=1e-5)
        assert row[f"{block}_std"] == pytest.approx(values.std(), abs=1e-5)


def test_one_row_for_every_slice_of_the_split_with_its_position(folder, explained):
    written = pd.read_csv(folder / "out" / "gates.csv")
    assert len(written) == 2 * 2 * 4
    assert set(written["patient"]) == {"P002", "P003"}
    affine = nibabel.load(folder / "images" / "labels" / "P002.nii.gz").affine
    one = written[(written["patient"] == "P002") & (written["source"] == "90keV")]
    np.testing.assert_allclose(one["position_mm"], affine[2, 3] + affine[2, 2] * np.arange(4), atol=1e-3)


def test_fractions_are_the_labels_share_of_the_body(folder, explained):
    labels = np.asarray(nibabel.load(folder / "images" / "labels" / "P003.nii.gz").dataobj).T
    values = json.loads((folder / "images" / "labels" / "labels.json").read_text())
    images = explained.images
    rows = images[(images["patient"] == "P003") & (images["source"] == "90keV")]
    for name in ("bone", "soft", "lung", "contrast"):
        expected = [(plane == values[name]).sum() / (plane > 0).sum() for plane in labels]
        np.testing.assert_allclose(rows[f"fraction_{name}"], expected)
    np.testing.assert_allclose(rows["body_share"], (labels > 0).mean(axis=(1, 2)))


def test_correlations_are_scipys_with_their_counts(explained):
    found = explained.summary["correlations"]
    images = explained.images
    for source, rows in [("all", images), ("90keV", images[images["source"] == "90keV"])]:
        one = next(c for c in found if (c["source"], c["block"], c["tissue"]) == (source, "art_6", "bone"))
        assert one["branch"] == "transformer"
        assert one["rho"] == pytest.approx(spearmanr(rows["art_6_transformer"], rows["fraction_bone"]).statistic)
        assert (one["n_images"], one["n_patients"]) == (len(rows), 2)


def test_examples_are_the_images_with_most_bone_and_most_soft_tissue(folder, explained):
    summary = json.loads((folder / "out" / "gates.json").read_text())
    images = explained.images[explained.images["source"] == "90keV"]
    for example, tissue in zip(summary["examples"], ("bone", "soft"), strict=True):
        assert example["fractions"][tissue] == images[f"fraction_{tissue}"].max()
        row = images[(images["patient"] == example["patient"]) & (images["slice"] == example["slice"])].iloc[0]
        assert example["shares"]["art_1"] == {"transformer": row["art_1_transformer"], "cnn": row["art_1_cnn"]}
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_table(explained))
    shown = console.export_text()
    for example in summary["examples"]:
        for shares in example["shares"].values():
            assert all(f"{share:.4f}" in shown for share in shares.values())


def test_movement_between_images_and_a_gate_that_never_moves(folder, explained, tmp_path):
    of_block = explained.summary["blocks"]["art_1"]
    assert of_block["cnn"]["std"] == pytest.approx(np.std(explained.images["art_1_cnn"]))
    assert of_block["cnn"]["max"] == explained.images["art_1_cnn"].max()
    predictor = Predictor(folder / "se.safetensors", "cpu")
    values = torch.linspace(0.1, 0.9, 32)
    predictor.net.art_1.fuse.gate.sigmoid.register_forward_hook(lambda _, x, y: values.expand_as(y))
    predictor.net.art_6.fuse.gate.sigmoid.register_forward_hook(lambda _, x, y: torch.rand(len(y), 1).expand_as(y))
    fixed = explain(predictor, folder / "manifest.csv", tmp_path, knock_out=False).summary
    assert fixed["blocks"]["art_1"]["nearly_constant"]
    assert "ART 1 is nearly constant" in fixed["blocks"]["art_1"]["verdict"]
    assert next(c for c in fixed["correlations"] if c["block"] == "art_1")["rho"] is None
    assert "ART 6 changes with the image" in fixed["blocks"]["art_6"]["verdict"]


def test_neither_one_image_nor_rounding_says_that_a_gate_moves():
    assert "seen in one image only" in movement("art_1", np.full((1, 4), 0.5))["verdict"]
    shares = 0.5 + 1e-8 * np.arange(6)
    table = pd.DataFrame({"patient": list("AABBCC"), "source": "s", "art_1_transformer": shares, "art_1_cnn": shares})
    table["fraction_bone"] = np.linspace(0, 1, 6)
    assert all(found["rho"] is None for found in correlations(table))


def test_plot_is_an_image(folder, explained):
    with Image.open(folder / "out" / "gates.png") as plot:
        assert plot.width > 1000 and np.asarray(plot.convert("L")).std() > 5


def test_without_labels_the_targets_hu_decide(folder, tmp_path):
    predictor = Predictor(folder / "se.safetensors", "cpu")
    result = explain(predictor, folder / "unlabelled.csv", tmp_path, split="train", knock_out=False)
    assert result.summary["tissues_by"] == "HU ranges of the target"
    assert set(result.images["patient"]) == {"P001"}
    for z, path in enumerate(sorted((folder / "images" / "70keV" / "P001").glob("*.dcm"))):
        plane = pydicom.dcmread(path)
        hu = plane.pixel_array * float(plane.RescaleSlope) + float(plane.RescaleIntercept)
        row = result.images[(result.images["source"] == "90keV") & (result.images["slice"] == z)].iloc[0]
        assert row["fraction_bone"] == pytest.approx((hu > 250).sum() / (hu > -950).sum())
        assert row["fraction_lung"] == pytest.approx(((hu > -950) & (hu <= -300)).sum() / (hu > -950).sum())


def test_errors_of_use_are_one_line(folder, tmp_path):
    for checkpoint_name, split, word in (
        ("concat", "test", "has no gates to describe"),
        ("se", "val", "no case in the split"),
    ):
        with pytest.raises(ConfigError, match=word) as raised:
            predictor = Predictor(folder / f"{checkpoint_name}.safetensors", "cpu")
            explain(predictor, folder / "manifest.csv", tmp_path / "out", split=split, knock_out=False)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_all_gates_are_written_with_their_ends_and_the_sources_energy(folder, explained):
    """gate_values.csv holds what gates.csv and channels.csv sum up: shares, dead and saturated channels, means."""
    values = pd.read_csv(folder / "out" / "gate_values.csv")
    channels = pd.read_csv(folder / "out" / "channels.csv")
    assert (explained.images["source_kev"] == explained.images["source"].str.removesuffix("keV").astype(float)).all()
    for block in ("art_1", "art_6"):
        gate_NC = values[values["block"] == block].drop(columns=["patient", "source", "slice", "block"]).to_numpy()
        np.testing.assert_allclose(gate_NC[:, 16:].mean(axis=1), explained.images[f"{block}_cnn"], atol=1e-5)
        assert (explained.images[f"{block}_dead"] == (gate_NC < 0.05).sum(axis=1)).all()
        assert (explained.images[f"{block}_saturated"] == (gate_NC > 0.95).sum(axis=1)).all()
        of_block = channels[channels["block"] == block]
        np.testing.assert_allclose(of_block["mean"], gate_NC.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(of_block["dead_share"], (gate_NC < 0.05).mean(axis=0))
        assert list(of_block["branch"]) == ["transformer"] * 16 + ["cnn"] * 16


def test_a_channel_at_an_end_is_counted_by_the_range_of_its_gate():
    gate = np.array([[0.0, 0.049, 0.5, 0.951, 1.0, 1.96]])
    counts = [gate_table({"art_1": gate}, highest)[["art_1_dead", "art_1_saturated"]].iloc[0] for highest in (1.0, 2.0)]
    assert [tuple(count) for count in counts] == [(2, 3), (2, 1)]
