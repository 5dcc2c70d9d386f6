"""Every command on one screen. Heavy imports live inside the commands, so that `seresvit --help` answers at once."""

import os
import signal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from seresvit.terminal import bar, fail, say, show, training_bar, warn_of_doubts

app = typer.Typer(
    help="Synthesise a medical image that was not acquired: SE-ResViT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Manifest = Annotated[Path, typer.Option("--manifest", help="manifest.csv of `seresvit audit`")]
Out = Annotated[Path, typer.Option("--out", help="folder to write")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="a.b=value, any setting of the YAML; repeatable")]
Checkpoint = Annotated[Path, typer.Argument(help="model.safetensors")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
NormStatistics = Annotated[
    Literal["running", "image"],
    typer.Option(help="image: normalise by each image, for old checkpoints tested in train mode"),
]
Flips = Annotated[bool, typer.Option("--flips", help="average with the prediction of the mirror image")]
Planes = Annotated[bool, typer.Option("--planes", help="average over three orthogonal planes; cubic voxels only")]
Tiles = Annotated[bool, typer.Option("--tiles", help="images larger than trained: overlapping tiles, shared gates")]
Ensemble = Annotated[
    list[Path] | None, typer.Option("--ensemble", help="another checkpoint to average with; repeatable")
]


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", help="folder to write")] = Path("demo")) -> None:
    """Everything below on simulated patients, on a laptop CPU in minutes."""
    from seresvit.config import shipped_config

    dicom, manifest, run_dir = out / "dicom", out / "manifest.csv", out / "run"
    predictions, evaluation = out / "predictions", out / "evaluation"
    if not dicom.exists():
        simulate(dicom, patients=28, slices=8, kev="70,110,115", seed=0)
    audit(dicom, source="110keV,115keV", target="70keV", out=manifest, val="P023,P024", test="P025,P026,P027,P028")
    train(shipped_config("tiny.yaml"), manifest=manifest, run_dir=run_dir)
    best = run_dir / "checkpoints" / "best" / "model.safetensors"
    predict(best, manifest, predictions)
    summary = evaluate(predictions, manifest=manifest, protocol="dect", out=evaluation).summary
    explain(best, manifest=manifest, out=evaluation)
    mae = summary[summary["source"] == "all"].set_index("method")
    for label in ("bone", "contrast", "embolus"):
        reached, unchanged, curve = mae.loc[["synthetic", "source unchanged", "intensity curve"], f"mae_{label}_mean"]
        say(
            f"MAE in {label}: {reached:.1f} HU, {reached / unchanged:.0%} of the unchanged source's {unchanged:.1f} HU "
            f"and {reached / curve:.0%} of the best intensity curve's {curve:.1f} HU"
        )
    say(f"look at {evaluation / 'report.html'}")


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    patients: int = 6,
    slices: int = 8,
    size: int = 128,
    kev: Annotated[str, typer.Option(help="energies, comma-separated")] = "70,110",
    seed: int = 0,
) -> None:
    """Write simulated dual-energy CT patients as DICOM."""
    from seresvit.config import ConfigError
    from seresvit.data import phantom

    try:
        energies = tuple(float(part) for part in kev.split(","))
    except ValueError:
        raise ConfigError(f"--kev {kev}: give energies in keV, comma-separated, such as 70,110") from None
    phantom.simulate(out, patients=patients, slices=slices, size=size, kev=energies, seed=seed)
    say(f"{patients} simulated patients at {kev} keV in {out}")


@app.command()
def audit(
    root: Annotated[Path, typer.Argument(help="folder with all images, or a CSV that names them")],
    source: Annotated[str, typer.Option(help="source modalities, comma-separated, each a case of its own")],
    target: Annotated[str, typer.Option(help="target modality")],
    out: Annotated[Path, typer.Option("--out", help="manifest to write, audit.json beside it")] = Path("manifest.csv"),
    layout: Annotated[
        Literal["auto", "modality/patient", "patient/modality", "aligned-png"], typer.Option(help="how the images lie")
    ] = "auto",
    mask: Annotated[str | None, typer.Option(help="modality that holds masks or label images")] = None,
    val: Annotated[str, typer.Option(help="validation patients, comma-separated; default: a random share")] = "",
    test: Annotated[str, typer.Option(help="test patients, comma-separated; default: a random share")] = "",
    exclude: Annotated[str, typer.Option(help="patients to leave out, comma-separated")] = "",
    seed: Annotated[int, typer.Option(help="of the random split")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="YAML of the training to come: its data.window_hu and data.resample count")
    ] = None,
    resample: Annotated[str, typer.Option(help="data.resample of the training to come: target, source or mm")] = "",
    pixels: Annotated[bool, typer.Option("--pixels/--no-pixels", help="read pixels, or only headers")] = True,
    workers: Annotated[int, typer.Option(min=1, help="processes; default: one a core")] = os.cpu_count() or 1,
    anonymize: Annotated[bool, typer.Option("--anonymize", help="write pseudonyms for the patients")] = False,
) -> None:
    """Find and check the pairs in a folder; write the manifest, audit.json and audit.html.

    Exits with 1, and writes no manifest, on any fault that would corrupt training.
    """
    from seresvit.config import load_config

    settings = load_config(config, [f"data.resample={resample}"] if resample else [])
    from seresvit.data import audit as auditing
    from seresvit.data.volume import DataError

    found = auditing.audit(
        root,
        _names(source),
        target,
        layout=layout,
        unpacked=out.parent / "unpacked",
        mask=mask,
        val=_names(val),
        test=_names(test),
        exclude=_names(exclude),
        seed=seed,
        data=settings.data,
        pixels=pixels,
        workers=workers,
        progress=bar("auditing"),
    )
    found = auditing.anonymized(found) if anonymize else found
    for finding in found.warnings:
        say(f"warning: {finding}")
    for finding in found.faults:
        say(f"fault: {finding}")
    earlier = f"; the earlier one is now {auditing.stale_path(out)}" if out.is_file() else ""
    if not auditing.write(found, out):
        raise DataError(
            f"{root}: {len(found.faults)} faults, listed above and in {out.with_name('audit.html')}; "
            f"no manifest was written{earlier}"
        )
    patients = {split: len({c.patient for c in found.cases if c.split == split}) for split in ("train", "val", "test")}
    counts = ", ".join(f"{count} {split}" for split, count in patients.items())
    say(f"{len(found.cases)} cases of {sum(patients.values())} patients ({counts}) → {out}")
    say(f"look at {out.with_name('audit.html')}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML of differences from the defaults, see configs/")],
    manifest: Manifest,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="run folder; the same command again resumes")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, try two steps, say what it takes, keep nothing")
    ] = False,
) -> None:
    """Train: config → run folder; the same again resumes.

    On several GPUs: torchrun --nproc-per-node 8 -m seresvit train … SIGTERM saves and ends with exit code 0, Ctrl-C
    with 130.
    """
    from seresvit.config import load_config

    settings = load_config(config, overrides or [])
    from seresvit.training import train as training
    from seresvit.training.processes import Stopped
    from seresvit.training.rehearsal import rehearse

    is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, the one that speaks
    say_once = say if is_first else lambda _: None
    if dry_run:
        say_once(rehearse(settings, manifest, run_dir))
        return
    try:
        with training_bar(visible=is_first) as progress:
            best = training.train(settings, manifest, run_dir, progress, bar("preparing") if is_first else iter)
    except Stopped as stopped:
        say_once(f"{stopped}; the same command goes on from there")
        raise typer.Exit(130 if stopped.signal == signal.SIGINT else 0) from None
    say_once(f"trained; the best checkpoint is {best}")


@app.command()
def predict(
    checkpoint: Checkpoint,
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="DICOM or PNG folder, NIfTI/MHA/NRRD file, or manifest.csv")
    ],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    split: Annotated[str, typer.Option(help="which cases of a manifest: train, val, test or all")] = "test",
    device: Device = "auto",
    norm_statistics: NormStatistics = "running",
    backend: Annotated[
        str, typer.Option(help="torch, auto (fast, checked against torch) or another; see docs/prediction.md")
    ] = "torch",
    mark: Annotated[
        Literal["overlay", "burned"] | None,
        typer.Option(help="the word SYNTHETIC on every slice: a DICOM overlay plane, or in the pixels"),
    ] = None,
    anonymize: Annotated[bool, typer.Option("--anonymize", help="write nothing that tells who the patient is")] = False,
    flips: Flips = False,
    planes: Planes = False,
    tiles: Tiles = False,
    ensemble: Ensemble = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="a second series: how wide the interval, or the spread, is")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="refuse a source that is unlike the training")] = False,
) -> None:
    """Synthesise a series, a volume or a manifest's cases.

    The geometry stays that of the source; DICOM comes out as a derived series. A manifest is shared out among the
    processes of torchrun -m seresvit predict, and cases that are finished are left as they are.
    """
    from seresvit.data.volume import DataError
    from seresvit.synthesis.ensemble import Members
    from seresvit.synthesis.pipeline import rank_and_size, wait_for_all
    from seresvit.synthesis.predict import Predictor, predict_manifest, predict_path

    members = Members(flips, planes, tiles, tuple(ensemble or ()))
    predictor = Predictor(checkpoint, device, norm_statistics, backend, members)
    if source.suffix != ".csv":
        written = predict_path(predictor, source, out, mark, anonymize, uncertainty, strict)
        say(f"synthetic {predictor.target_name or 'target'} → {written}")
        warn_of_doubts([out])
        return
    is_first = rank_and_size()[0] == 0
    progress = bar("synthesising") if is_first else iter
    failures = predict_manifest(predictor, source, out, split, progress, mark, anonymize, uncertainty, strict)
    for failure in failures:
        say(f"failed: {failure.name}: {failure.reason}")
    wait_for_all()
    if is_first:
        warn_of_doubts(sorted(out.iterdir()) if out.is_dir() else [])
    if failures:
        raise DataError(f"{source}: {len(failures)} cases failed, listed above; the others are in {out}")
    say(f"synthetic {predictor.target_name or 'target'} of every {split} case → {out}")


@app.command()
def calibrate(
    checkpoint: Checkpoint,
    manifest: Manifest,
    split: Annotated[str, typer.Option(help="whose patients the intervals are taken from")] = "val",
    held_out: Annotated[str, typer.Option(help="whose patients they are tried on")] = "test",
    coverage: Annotated[float, typer.Option(min=0.5, max=0.99, help="share of voxels inside")] = 0.9,
    device: Device = "auto",
    norm_statistics: NormStatistics = "running",
    flips: Flips = False,
    planes: Planes = False,
    tiles: Tiles = False,
    ensemble: Ensemble = None,
) -> None:
    """Intervals for `predict --uncertainty`, and how often they hold.

    Written beside the checkpoint; they are for predictions with these very flips, planes, tiles and checkpoints.
    """
    from seresvit.evaluation.tissues import TISSUES_HU
    from seresvit.synthesis.calibrate import calibrate as calibrated
    from seresvit.synthesis.ensemble import Members
    from seresvit.synthesis.predictor import Predictor, intervals_path

    members = Members(flips, planes, tiles, tuple(ensemble or ()))
    predictor = Predictor(checkpoint, device, norm_statistics, members=members)
    intervals, table = calibrated(predictor, manifest, split, held_out, coverage, TISSUES_HU, bar("calibrating"))
    for region, row in table.iterrows():
        say(
            f"{region}: {row['inside']:.1%} of voxels inside ({row['lowest']:.1%} to {row['highest']:.1%} of "
            f"{row['patients']:.0f} held-out patients), half-width {row['half_width']:.1f}"
        )
    say(f"{100 * coverage:g}% intervals of {intervals.num_patients} patients → {intervals_path(checkpoint)}")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="folder that `seresvit predict` wrote for a manifest")],
    manifest: Manifest,
    out: Out,
    protocol: Annotated[str, typer.Option(help="how to score; see docs/metrics.md")] = "dect",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="count missing cases and slices without a partner, do not fail")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="folder of another evaluation of the same cases, to compare with")
    ] = None,
) -> Any:
    """Score predictions against their targets: tables, statistics by patient, page.

    Writes summary, patients, cases, slices and statistics as CSV, evaluation.xlsx, evaluation.json and report.html.
    """
    from seresvit.evaluation import evaluate as evaluation
    from seresvit.evaluation import tables
    from seresvit.evaluation.report import write_report

    result = evaluation.evaluate(predictions, manifest, protocol, out, allow_missing, against)
    report = write_report(out, predictions, manifest)
    show(tables.render_table(result))
    for line in (*result.missing, *result.notes, *tables.sentences(result)):
        say(line)
    say(f"tables → {out}, page → {report}")
    return result


@app.command()
def explain(
    checkpoint: Checkpoint,
    manifest: Manifest,
    out: Out,
    split: Annotated[str, typer.Option(help="train, val, test or all")] = "test",
    device: Device = "auto",
    knockouts: Annotated[
        bool,
        typer.Option("--knockouts/--no-knockouts", help="also switch parts of the gates off and measure the error"),
    ] = True,
) -> None:
    """What the gates did in each image, and what the image loses without them.

    Writes the tables, figures and gates.json of docs/gates.md, and adds them to report.html where it is.
    """
    from seresvit.evaluation import explain as explaining
    from seresvit.evaluation.report import write_report
    from seresvit.synthesis.predict import Predictor

    predictor = Predictor(checkpoint, device)
    result = explaining.explain(predictor, manifest, out, split=split, knock_out=knockouts, progress=bar)
    report = write_report(out)
    show(explaining.render_table(result))
    say(f"gates → {out}, page → {report}")


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="YAML of differences from the defaults, see configs/")],
    manifest: Manifest,
    out: Out,
    fusions: Annotated[str, typer.Option(help="values of model.fusion.kind, comma-separated")] = "concat,se",
    seeds: Annotated[int, typer.Option(min=1, help="runs of each fusion, from train.seed on")] = 3,
    protocol: Annotated[str, typer.Option(help="how to score; see docs/metrics.md")] = "dect",
    overrides: Overrides = None,
    runs_only: Annotated[
        bool,
        typer.Option("--runs-only", help="write no tables: one more process at the runs"),
    ] = False,
) -> None:
    """Fusions under one budget, several seeds: which is better?

    Trains, predicts and evaluates every run, on all GPUs at once; the same command again goes on. Writes compare.csv,
    comparisons.csv, patients.csv, curves.csv, curves.png, compare.json and report.html.
    """
    from seresvit.config import load_config

    settings = load_config(config, overrides or [])
    from seresvit.data.volume import DataError
    from seresvit.evaluation import compare as comparing
    from seresvit.evaluation.report import write_comparison
    from seresvit.evaluation.trials import Comparison, begin, work
    from seresvit.training.processes import Stopped

    asked = Comparison(settings, manifest, tuple(_names(fusions)), seeds, protocol, out)
    try:
        if runs_only:
            begin(asked)
            work(asked, say)
            return
        result = comparing.compare(asked, say, training_bar, bar("preparing"))
    except Stopped as stopped:
        say(f"{stopped}; the same command goes on from there")
        raise typer.Exit(130 if stopped.signal == signal.SIGINT else 0) from None
    show(comparing.render_table(result))
    for line in (*result.record["verdict"], *result.record["notes"]):
        say(line)
    page = write_comparison(out)
    failed = result.record["failed"]
    for run in failed:
        say(f"failed: {run['fusion']}, seed {run['seed']}: {run['reason']}")
    if failed:
        raise DataError(f"{out}: {len(failed)} runs failed, listed above; the tables are of the others")
    say(f"tables → {out}, page → {page}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="latest_net_G.pth or model.safetensors")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="model.safetensors, .onnx, .xml, net.pth, or a BUNDLE/")],
    overrides: Overrides = None,
    int8: Annotated[
        Path | None, typer.Option("--int8", metavar="IMAGES", help="ONNX, OpenVINO: 8 bits, set by these images")
    ] = None,
) -> None:
    """Turn a published .pth into our checkpoint, or back; or our checkpoint into ONNX, OpenVINO or a MONAI bundle.

    A name without a suffix is that of a bundle, a new folder.

    A .pth says nothing of its intensity rule: state it, as in --set data.window_hu=[-1024,3071].
    """
    from seresvit.config import load_config

    settings = load_config(None, overrides or [])
    from seresvit.model import checkpoint

    if int8:
        from seresvit.evaluation.tissues import TISSUES_HU
        from seresvit.synthesis.quantise import export_int8

        errors = export_int8(source, out, int8, TISSUES_HU)
        say("mean absolute error of int8: " + ", ".join(f"{name} {error:.2f}" for name, error in errors.items()))
    elif out.suffix in (".onnx", ".xml"):
        from seresvit.synthesis.export import export

        export(source, out)
    elif source.suffix == ".safetensors" and not out.suffix:
        from seresvit.synthesis.bundle import write_bundle

        write_bundle(source, out)
    else:
        checkpoint.convert(source, out, settings.data)
    say(f"{source} → {out}")


@app.command()
def serve(
    checkpoint: Annotated[list[Path], typer.Option("--checkpoint", help="model.safetensors; repeatable")],
    folder: Annotated[Path, typer.Option(help="where jobs and results are kept")] = Path("served"),
    host: Annotated[
        str, typer.Option(help="others than this machine's own need a token or certificates")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8080,
    token_file: Annotated[Path | None, typer.Option(help="file whose line requests must bear")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM, of this server")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM, of this server")] = None,
    tls_clients: Annotated[Path | None, typer.Option(help="PEM of the authority that signs who may come")] = None,
    device: Device = "auto",
    backend: Annotated[str, typer.Option(help="as in predict")] = "torch",
    keep_hours: Annotated[float, typer.Option(min=0.0, help="then results are erased")] = 24.0,
    most_waiting: Annotated[int, typer.Option(min=1, help="jobs in the queue")] = 50,
    most_upload_mib: Annotated[int, typer.Option(min=1, help="of one upload")] = 2048,
    most_unpacked_mib: Annotated[int, typer.Option(min=1, help="of one upload when unpacked")] = 8192,
    most_minutes: Annotated[float, typer.Option(min=0.0, help="at work on one job")] = 60.0,
    dicom: Annotated[str | None, typer.Option(metavar="AET:PORT", help="be a DICOM node too")] = None,
    accept: Annotated[
        list[str] | None, typer.Option(metavar="AET@ADDRESS[:PORT]", help="who may send; default: this machine")
    ] = None,
    send_to: Annotated[
        list[str] | None, typer.Option(metavar="AET@HOST:PORT", help="where synthetic series go")
    ] = None,
    stow: Annotated[str | None, typer.Option(metavar="URL", help="DICOMweb server where they go")] = None,
    stow_credentials_file: Annotated[Path | None, typer.Option(help="USER:PASSWORD, or a token, for --stow")] = None,
    commit: Annotated[
        bool, typer.Option("--commit", help="delivered: once --send-to commits itself to it, where it offers that")
    ] = False,
    quiet_s: Annotated[float, typer.Option(help="a series is complete when silent for so long")] = 10.0,
    dicom_tls_cert: Annotated[Path | None, typer.Option(help="PEM, of the node")] = None,
    dicom_tls_key: Annotated[Path | None, typer.Option(help="PEM, of the node")] = None,
    dicom_tls_ca: Annotated[Path | None, typer.Option(help="PEM of the authority of the other nodes")] = None,
) -> None:
    """Web page and REST interface; with --dicom a DICOM node.

    Images are given on the page, by REST or by C-STORE, and synthesised one after another. See docs/serving.md.
    """
    from seresvit.config import ConfigError

    try:
        from seresvit.serving import serve as serving
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs {error.name}; install seresvit[serve]") from None
    fields = serving.ServeSettings.__dataclass_fields__
    options: dict[str, Any] = {name: value for name, value in locals().items() if name in fields}
    options |= {"checkpoints": tuple(checkpoint), "accept": tuple(accept or ()), "send_to": tuple(send_to or ())}
    serving.serve(serving.ServeSettings(**options), say)


def main() -> None:
    """Run a command; an error that the user can mend is one line on stderr: exit 2 for bad usage, 1 for failed work."""
    try:
        app()
    except Exception as error:
        from seresvit.config import ConfigError
        from seresvit.data.volume import DataError

        if isinstance(error, ConfigError):
            fail(error, 2)
        if isinstance(error, DataError):
            fail(error, 1)
        if isinstance(error, OSError):
            fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be loaded
            fail("the device's memory is full; lower train.batch_size or train.size, or use --device cpu", 1)
        raise


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


if __name__ == "__main__":
    main()
