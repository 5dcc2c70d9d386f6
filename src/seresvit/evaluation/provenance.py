"""What a report says of its network: from the checkpoint, and from the run folder that it lies in."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seresvit.data.volume import DataError
from seresvit.evaluation.charts import learning_curves
from seresvit.evaluation.page import read_json
from seresvit.model import checkpoint


def trained(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts as (term, words), curves and settings; less of it when the checkpoint or its run folder is gone."""
    facts: list[tuple[str, str]] = []
    try:
        state, header = checkpoint.read(path)
        learned = (
            tensor for key, tensor in state.items() if not re.search(r"\.(running_\w+|num_batches_tracked)$", key)
        )
        facts += _facts_of_checkpoint(header, sum(tensor.numel() for tensor in learned))
    except DataError:
        header = {}
        facts.append(("Checkpoint", f"{path.name}, no longer where it was at prediction"))
    in_run = path.parent.parent.name == "checkpoints"  # a comparison's folder has a config.yaml and manifest.json, too
    run = path.parents[2] if in_run else path.parent
    made = read_json(run / "manifest.json") if in_run and (run / "config.yaml").is_file() else None
    log = _read_log(run / "log.jsonl") if made else pd.DataFrame()
    if made:
        patients, planes = made["num_patients"], made["num_slices"]
        verbs = {"train": "to train", "val": "to validate"}
        counts = (f"{patients[split]} {verb} ({planes[split]:,} slices)" for split, verb in verbs.items())
        facts.append(("Patients", ", ".join(counts)))
        if len(log):
            seen = (f"{of.images.max():,} in stage {stage}" for stage, of in log.groupby("stage"))
            facts.append(("Images seen", " and ".join(seen)))
        facts.append(("Machine", f"{made['device_name']} ({made['device']}), precision {made['precision']}"))
        versions = f"seresvit {made['seresvit']}, PyTorch {made['torch']}, Python {made['python']}"
        facts.append(("Software", versions + (f", commit {made['commit']}" if made.get("commit") else "")))
        facts.append(("Seed", str(made["seed"])))
    elif header:
        facts.append(("Software", f"seresvit {header['version']}, commit {header.get('commit') or 'not known'}"))
    if records:
        rate = sum(r["elapsed_s"] for r in records) / max(sum(r["num_slices"] for r in records), 1)
        day = f", {records[0]['created'][:10]}" if records[0].get("created") else ""
        facts.append(("Prediction", f"{rate:.2g} s a slice on {records[0].get('device', 'its device')}{day}"))
        facts.append(("Checkpoint SHA-256", records[0]["checkpoint_sha256"][:16] + "…"))
    unit = (header.get("target_intensity") or {}).get("unit", "")
    return {
        "sources": header.get("sources") or sorted({r["source"] for r in records}),
        "target": header.get("target") or (records[0]["target"] if records else "target"),
        "facts": facts,
        "curves": learning_curves(log, unit) if len(log) else None,
        "settings": (run / "config.yaml").read_text(encoding="utf-8") if made else "",
    }


def _facts_of_checkpoint(header: checkpoint.Header, parameters: int) -> list[tuple[str, str]]:
    model, rule = header.get("model", {}), header.get("target_intensity") or {}
    unit = rule.get("unit", "").replace("arbitrary", "")
    blocks = " and ".join(f"ART {number}" for number in model.get("transformer_blocks", ()))
    kind = model.get("fusion", {}).get("kind")
    joined = {"se": "SE gates", "concat": "concatenation, no gates"}.get(kind, f"fusion {kind}")
    network = f"transformers in {blocks}, {joined}" if blocks else "convolutions only, no transformer"
    facts = [("Network", f"{network}; {parameters / 1e6:,.2f} million parameters")]
    if "train_size" in header:
        facts.append(("Image size in training", " × ".join(str(n) for n in header["train_size"])))
    if rule:
        facts.append(("Target values", f"{rule['low']:g} to {rule['high']:g} {unit}".replace("-", "−")))
    if "val_mae" in header:
        score = f"validation MAE {header['val_mae']:.1f} {unit}".strip()
        facts.append(("This checkpoint", f"stage {header['stage']} after {header['images']:,} images, {score}"))
    return facts


def _read_log(path: Path) -> pd.DataFrame:
    """The lines of log.jsonl with `seen`, the images over both stages; what a resumed run did again counts once."""
    kept: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        line = json.loads(text)
        while kept and (kept[-1]["stage"], kept[-1]["images"]) > (line["stage"], line["images"]):
            kept.pop()
        kept.append(line)
    log = pd.DataFrame(kept, columns=None if kept else ["stage", "images"])
    first = log.loc[log["stage"] == 1, "images"].max() if (log["stage"] == 1).any() else 0
    return log.assign(seen=log["images"] + np.where(log["stage"] == 2, first, 0))
