"""Knock-outs of small random networks, against networks whose weights do the same, run by Predictor on volumes."""

import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from seresvit.config import ConfigError, DataSettings, FusionSettings, ModelSettings, VitSettings
from seresvit.data import read_volume
from seresvit.data.pairing import Case, write_manifest
from seresvit.data.phantom import simulate
from seresvit.evaluation import knockouts
from seresvit.evaluation.explain import explain, judge, render_table
from seresvit.evaluation.knockouts import top_channels
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predictor import Predictor

VIT = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
PATIENTS = ("P001", "P002", "P003")
BLOCKS = ("art_1", "art_6")
HALF = 8  # channels of one branch


def write_checkpoint(path, kind, blocks=(1, 6)):
    """A network whose gates differ between images, and whose output the fusions reach."""
    torch.manual_seed(0)
    settings = ModelSettings(
        base_channels=2, token_grid=(3, 3), vit=VIT, fusion=FusionSettings(kind=kind), transformer_blocks=blocks
    )
    network = Generator(settings)
    for name, parameter in network.named_parameters():
        if ".fuse." in name or name.endswith("conv.weight"):
            std = 5.0 if ".fuse." in name else 4.0 if name == "head.conv.weight" else 0.1
            nn.init.normal_(parameter, std=std)
    checkpoint.save(network, path, {"data": DataSettings().model_dump(mode="json"), "run": "demo"})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """P001 for training, P002 and P003 tested, three slices each, and a checkpoint with SE."""
    root = tmp_path_factory.mktemp("knockouts")
    simulate(root, patients=3, slices=3, size=46, kev=(70, 110))
    cases = [
        Case(p, "train" if p == "P001" else "test", "110keV", "70keV", root / "110keV" / p, root / "70keV" / p, mask)
        for p in PATIENTS
        for mask in [root / "labels" / f"{p}.nii.gz"]
    ]
    write_manifest(cases, root / "manifest.csv")
    write_manifest([case for case in cases if case.split == "test"], root / "untrained.csv")
    write_checkpoint(root / "se.safetensors", "se")
    return root


@pytest.fixture(scope="module")
def predictor(folder):
    return Predictor(folder / "se.safetensors", "cpu")


@pytest.fixture(scope="module")
def explained(folder, predictor):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knockouts, "CHANNEL_SLICES", 6)  # all that there are
        return explain(predictor, folder / "manifest.csv", folder / "out")


def maes(predictor, folder, patient):
    """Region → MAE in HU of what the predictor makes of the patient's series: the image, and two labels."""
    target = read_volume(folder / "70keV" / patient).array
    labels = nibabel.load(folder / "labels" / f"{patient}.nii.gz").get_fdata().transpose(2, 1, 0)
    values = json.loads((folder / "labels" / "labels.json").read_text())
    error = np.abs(predictor(read_volume(folder / "110keV" / patient)).array.astype(np.float64) - target)
    return {"image": error.mean()} | {name: error[labels == values[name]].mean() for name in ("bone", "soft")}


def expect(explained, folder, knockout, site, changed, intact):
    """The table's rows of this knock-out are the MAEs of the changed network less those of the intact one."""
    rows = explained.knockouts.set_index(["knockout", "site", "region"])
    for region in ("image", "bone", "soft"):
        row = rows.loc[(knockout, site, region)]
        before, after = (
            np.mean([maes(p, folder, patient)[region] for patient in PATIENTS[1:]]) for p in (intact, changed)
        )
        assert row["mae_intact"] == pytest.approx(before, rel=1e-5)
        assert row["change"] == pytest.approx(after - before, rel=1e-3, abs=1e-3)
        assert row["n"] == 2 and np.isnan(row["low"]) and row["why_no_p"]
    assert abs(rows.loc[(knockout, site, "image"), "change"]) > 0.01


def without_channels(folder, blocks, channels):
    """The network whose compression has no weight for these channels: nothing of them goes on."""
    changed = Predictor(folder / "se.safetensors", "cpu")
    with torch.no_grad():
        for block in blocks:
            compress = getattr(changed.net, block).compress
            compress.body[0].conv.weight[:, channels] = 0
            compress.skip.conv.weight[:, channels] = 0
    return changed


@pytest.mark.parametrize(("branch", "half"), [("transformer", slice(HALF)), ("cnn", slice(HALF, None))])
def test_a_shut_half_is_a_network_without_its_weights(folder, predictor, explained, branch, half):
    expect(explained, folder, f"{branch} shut", "all", without_channels(folder, BLOCKS, half), predictor)
    expect(explained, folder, f"{branch} shut", "art_6", without_channels(folder, ["art_6"], half), predictor)


def test_a_shut_channel_is_a_network_without_its_weights_and_is_ranked(folder, predictor, explained):
    table = explained.channels.set_index(["block", "channel"])
    for block, channel in (("art_1", 3), ("art_6", 12)):
        changed = without_channels(folder, [block], [channel])
        for region, column in (("image", "mae_change"), ("bone", "mae_change_bone")):
            differences = [maes(changed, folder, p)[region] - maes(predictor, folder, p)[region] for p in PATIENTS[1:]]
            assert table.loc[(block, channel), column] == pytest.approx(np.mean(differences), rel=1e-3, abs=2e-3)
    for _, of_block in explained.channels.groupby("block"):
        by_rank = of_block.sort_values("rank_bone")
        assert by_rank["mae_change_bone"].is_monotonic_decreasing and len(by_rank) == 2 * HALF
        assert by_rank["rank_bone"].tolist() == list(range(1, 2 * HALF + 1))
    carriers = explained.summary["channels_carrying"]
    assert carriers[0]["change"] == pytest.approx(explained.channels["mae_change_bone"].max())
    assert [c["change"] for c in carriers] == sorted((c["change"] for c in carriers), reverse=True)
    assert all((c["branch"] == "cnn") == (c["channel"] >= HALF) for c in carriers)


def test_gates_at_the_training_mean_are_constants_from_training_images(folder, predictor, explained):
    seen = {block: [] for block in BLOCKS}
    watched, changed = (Predictor(folder / "se.safetensors", "cpu") for _ in range(2))
    for block in BLOCKS:
        gate = getattr(watched.net, block).fuse.gate
        gate.register_forward_hook(lambda _, x, gate_BC, block=block: seen[block].append(gate_BC))
    watched(read_volume(folder / "110keV" / "P001"))
    for block in BLOCKS:
        mean = torch.cat(seen[block]).mean(dim=0)
        getattr(changed.net, block).fuse.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Constant(mean))
    expect(explained, folder, knockouts.TRAINING_MEAN, "all", changed, predictor)
    assert explained.summary["mean_gates_of"] == "3 training images"


class Constant(nn.Module):
    def __init__(self, value_C):
        super().__init__()
        self.value_C = value_C

    def forward(self, x_BC):
        return self.value_C.expand(len(x_BC), -1)


def test_without_training_cases_the_mean_is_of_the_explained_images(folder, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(knockouts, "CHANNEL_SLICES", 1)
    found = explain(predictor, folder / "untrained.csv", tmp_path)
    assert found.summary["mean_gates_of"] == "the explained images"
    assert "its mean over the explained images" in found.summary["claim"]["sentence"]


def test_gates_that_never_move_can_be_fixed_and_swapped_without_effect(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(knockouts, "CHANNEL_SLICES", 1)
    frozen = Predictor(write_checkpoint(tmp_path / "frozen.safetensors", "se-frozen"), "cpu")
    found = explain(frozen, folder / "manifest.csv", tmp_path / "out")
    rows = found.knockouts.set_index(["knockout", "region"]).sort_index()
    for knockout in (knockouts.TRAINING_MEAN, knockouts.SWAPPED):
        np.testing.assert_allclose(rows.loc[(knockout, "image"), "change"], 0, atol=1e-3)
    assert (rows.loc[("transformer shut", "image"), "change"].abs() > 0.01).any()
    assert found.summary["claim"]["holds"] is False
    assert all(of_block["nearly_constant"] for of_block in found.summary["blocks"].values())


def test_swapped_gates_come_from_another_patient(folder, predictor, explained):
    """With one other patient, whose gates are all set to one row, swapping is fixing them at that row."""
    assert explained.knockouts.set_index(["knockout", "region"])["change"][knockouts.SWAPPED, "image"] != 0
    samples = [sample(patient, torch.full((2, 1, 46, 46), fill)) for patient, fill in (("A", 0.2), ("B", -0.6))]
    donor = knockouts._donor_gates(predictor, samples, samples[0], np.arange(3), np.random.default_rng(0))
    with torch.inference_mode(), knockouts.record_gates(predictor.net) as gates:
        predictor.net(samples[1].inputs[:1])
    for block in BLOCKS:
        torch.testing.assert_close(donor[block], gates[block].expand(3, -1))


def test_alone_a_patient_never_gets_the_gates_of_the_very_image(predictor):
    """Three constant images of one patient, whose gates differ; and one image, which has no other."""
    inputs = torch.tensor([0.2, -0.6, 0.9])[:, None, None, None].expand(3, 1, 46, 46)
    alone, places, rng = sample("A", inputs), np.array([0, 1, 2]), np.random.default_rng(0)
    with torch.inference_mode(), knockouts.record_gates(predictor.net) as own:
        predictor.net(inputs)
    for _ in range(5):
        donor = knockouts._donor_gates(predictor, [alone], alone, places, rng)
        assert (donor["art_1"] - own["art_1"]).abs().amax(dim=1).min() > 1e-4
    single = sample("A", inputs[:1])
    assert knockouts._donor_gates(predictor, [single], single, places[:1], rng) == {}


def test_without_a_voxel_of_bone_the_whole_image_ranks_channels(folder, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(knockouts, "CHANNEL_SLICES", 1)
    for patient in ("P001", "P002"):
        planes = np.zeros((46, 46, 3), np.uint8)
        planes[10:30, 10:30] = 2
        image = nibabel.load(folder / "labels" / f"{patient}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(planes, image.affine), tmp_path / f"{patient}.nii.gz")
    (tmp_path / "labels.json").write_text('{"bone": 1, "soft": 2}')
    cases = [
        Case(p, split, "110keV", "70keV", folder / "110keV" / p, folder / "70keV" / p, tmp_path / f"{p}.nii.gz")
        for p, split in (("P001", "train"), ("P002", "test"))
    ]
    write_manifest(cases, tmp_path / "manifest.csv")
    found = explain(predictor, tmp_path / "manifest.csv", tmp_path / "out")
    assert found.summary["channels_carrying"][0]["region"] == "image"
    assert "most needed channels shut" in set(found.knockouts["knockout"])


def test_a_map_that_no_other_image_could_replace_is_not_judged():
    row = {"knockout": knockouts.MAP_MEAN, "site": "all", "region": "image"}
    claim = judge(pd.DataFrame([row]), "aff", "")
    assert claim["holds"] is None and "not shown" in claim["sentence"]


def sample(patient, inputs):
    return knockouts.Sample(patient, "110keV", inputs, np.zeros((2, 46, 46)), {}, lambda values: values, "HU")


def test_top_channels_are_chosen_by_the_other_patients():
    changes = pd.DataFrame(
        [
            (
                "art_1",
                channel,
                patient,
                region,
                float(channel == best) + (9 if region == "image" and channel == 7 else 0),
            )
            for patient, best in (("A", 1), ("B", 2), ("C", 2))
            for channel in range(16)
            for region in ("image", "bone")
        ],
        columns=["block", "channel", "patient", "region", "change"],
    )
    assert [top_channels(changes, "bone", patient)["art_1"] for patient in "AB"] == [[2], [1]]
    assert top_channels(changes, "image", "A")["art_1"] == [7]
    alone = changes[changes["patient"] == "A"]
    assert top_channels(alone, "bone", "A")["art_1"] == [1]


@pytest.mark.parametrize(
    ("change", "low", "high", "n", "p", "holds", "words"),
    [
        (
            2.0,
            1.0,
            3.0,
            9,
            0.004,
            True,
            "yes; fixing every gate at its mean over 64 training images changes",
        ),
        (2.0, 1.0, 3.0, 9, 0.06, None, "not shown"),
        (2.0, 1.0, 3.0, 5, np.nan, None, "not shown"),  # the interval of so few is no test
        (0.2, 0.1, 2.0, 9, 0.01, False, "hardly"),
        (0.1, -0.2, 0.3, 9, 0.3, False, "no, not in effect"),
        (0.1, -0.2, 0.3, 5, np.nan, None, "not shown"),
        (-2.0, -3.0, -1.0, 9, 0.004, False, "serves an image worse"),
        (2.0, -1.0, 5.0, 9, 0.1, None, "not shown"),
        (2.0, None, None, 3, np.nan, None, "too few"),
        (0.0, None, None, 3, np.nan, False, "does as well"),
    ],
)
def test_the_claim_is_judged_by_the_test_and_the_size_of_the_change(change, low, high, n, p, holds, words):
    row = {"knockout": knockouts.TRAINING_MEAN, "site": "all", "region": "image", "mae_intact": 50.0, "unit": "HU"}
    row |= {"change": change, "low": low, "high": high, "n": n, "p": p, "percent": change * 2}
    claim = judge(pd.DataFrame([row | {"why_no_interval": "too few"}]), "se", "64 training images")
    assert claim["holds"] is holds and words in claim["sentence"] and f"n = {n} patients" in claim["sentence"]


@pytest.mark.parametrize("kind", ["concat", "aff", "spatial-se"])
def test_every_form_of_fusion_can_be_explained(folder, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(knockouts, "CHANNEL_SLICES", 1)
    network = Predictor(write_checkpoint(tmp_path / "net.safetensors", kind), "cpu")
    found = explain(network, folder / "manifest.csv", tmp_path / "out")
    names = set(found.knockouts["knockout"])
    assert {"transformer shut", "cnn shut", "bone channels shut", "random channels shut"} <= names
    fuse = network.net.art_1.fuse
    assert (knockouts.TRAINING_MEAN in names) == hasattr(fuse, "gate") == (tmp_path / "out" / "gates.png").is_file()
    assert (knockouts.MAP_FLIPPED in names) == hasattr(fuse, "map") == (tmp_path / "out" / "maps.png").is_file()
    of_both = (found.knockouts["region"] == "image") & (found.knockouts["site"] == "all")
    changed = found.knockouts[of_both].set_index("knockout")["change"]
    assert (changed.loc[[name for name in names if "maps" in name]].abs() > 1e-4).all()
    assert found.summary["claim"]["sentence"].startswith("Each image sets its own balance: ")
    assert render_table(found).row_count == (2 if kind == "concat" else 3)
    written = json.loads((tmp_path / "out" / "gates.json").read_text())
    assert written["fusion"] == kind and len(written["examples"]) == 2


def test_maps_are_measured_where_the_tissue_is(folder, tmp_path):
    """Against torch's own nearest upsampling of the map, cut to the image, inside the bone of the label image."""
    network = Predictor(write_checkpoint(tmp_path / "net.safetensors", "attention-gate"), "cpu")
    maps = explain(network, folder / "manifest.csv", tmp_path / "out", knock_out=False).maps
    seen = []
    network.net.art_6.fuse.map.register_forward_hook(lambda _, x, map_BKHW: seen.append(map_BKHW))
    network(read_volume(folder / "110keV" / "P002"))
    map_Z2YX = nn.functional.interpolate(torch.cat(seen), scale_factor=4.0, mode="nearest")[..., :46, :46].numpy()
    labels = nibabel.load(folder / "labels" / "P002.nii.gz").get_fdata().transpose(2, 1, 0)
    bone = labels == json.loads((folder / "labels" / "labels.json").read_text())["bone"]
    rows = maps[(maps["patient"] == "P002") & (maps["block"] == "art_6")].set_index(["branch", "slice"])
    for z in range(3):
        assert rows.loc[("cnn", z), "in_bone"] == pytest.approx(map_Z2YX[z, 1][bone[z]].mean(), rel=1e-5)
        assert rows.loc[("cnn", z), "std"] == pytest.approx(torch.cat(seen)[z, 1].std(correction=0).item(), rel=1e-4)
    with Image.open(tmp_path / "out" / "maps.png") as picture:
        colours = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.ptp(colours, axis=2) > 30).mean() > 0.05
    assert not (tmp_path / "out" / "knockouts.csv").exists()


def test_what_cannot_be_explained_is_refused_in_one_line(folder, tmp_path):
    for kind, blocks, words in (("concat", (1, 6), "leave out --no-knockouts"), ("se", (), "fuses nothing")):
        network = Predictor(write_checkpoint(tmp_path / "net.safetensors", kind, blocks), "cpu")
        with pytest.raises(ConfigError, match=words) as raised:
            explain(network, folder / "manifest.csv", tmp_path / "out", knock_out=False)
        assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_large_effect_in_eight_patients_is_shown_however_much_else_was_tried():
    """p is adjusted among the knock-outs that ask the same: over all 13, the smallest p of 8 patients would be 0.10."""
    asked = {"gates at training mean": 3, "gates swapped": 1, "transformer shut": 3, "cnn shut": 3}
    asked |= {"bone channels shut": 1, "most open channels shut": 1, "random channels shut": 1}
    tried = [("intact", "all"), *((name, site) for name, n in asked.items() for site in ("all", *BLOCKS)[:n])]
    rows = [
        {"knockout": name, "site": site, "patient": f"P{k}", "region": "image", "sum": 100.0 * k, "pixels": 10}
        | ({} if name == "intact" else {"sum": 101.0 * k + 300})
        for name, site in tried
        for k in range(1, 9)
    ]
    table, sentences = knockouts._differences(pd.DataFrame(rows), "HU", 8)
    family = {name: {"gates": 4, "trans": 6, "cnn s": 6}.get(name[:5], 3) for name in asked}
    expected = [min(1.0, family[name] * 2 / 2**8) for name in table["knockout"]]
    assert len(table) == 13 and table["p_adjusted"].tolist() == pytest.approx(expected)
    assert any(words.startswith("CNN shut raises MAE by 30 HU against the intact network") for words in sentences)
    assert not any("no difference" in words for words in sentences)
