"""What a task needs, what of it is here, and what to expect: ``python run.py task=... check=true``.

Takes seconds; nothing is downloaded, and no weights are read but those of an embedded model.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edadm import memory
from edadm.config import Settings
from edadm.errors import EdadmError
from edadm.estimate import not_counted, seconds_per_row, stage_passes
from edadm.keys import Run
from edadm.metric_needs import FETCHED, HERE, MISSING, Need, needs_of_metrics
from edadm.parts import build_part
from edadm.progress import duration
from edadm.store import Store, cache_root
from edadm.tasks import weights
from edadm.tasks.base import PIPELINE, WEIGHTS, Task
from edadm.tasks.checkpoint_file import require_whole

COPIES = 3  # of the denoiser in memory while it is reconstructed: float weights, quantized ones, what is learned
WORKING_MEMORY = 4e9  # bytes of activations beside it, for the tasks of the paper
# Of a row of TDAC's feature for each position of a sample; conf/model has none, as it would tell records apart.
FEATURE_NUMBERS = {
    "cifar10_tiny": 3, "cifar10_ldm_tiny": 16, "cifar10_dit_tiny": 36, "cifar10_t2i_tiny": 12, "ddim_cifar10": 4,
    "ldm4_bedroom": 14, "ldm4_imagenet": 15, "ldm8_church": 3, "sd14": 20, "dit_xl_2": 288,
}  # fmt: skip
EFFICIENCY = 0.35  # of a network against a plain matrix product on the same device


def report(settings: Settings) -> tuple[str, bool]:
    """Return what a run of these settings needs as text, and whether nothing is missing."""
    task = task_without_download(settings)
    run = Run(settings, task, Store(), _device(settings), torch.get_num_threads())
    needs = list(needs_of(run))
    lines = [f"{settings.label} on task {task.name}, profile {settings['profile.name']}", "Needs"]
    lines += [need.line for need in needs]
    if not _is_unknown(run):
        lines += ["Takes", *time_lines(run), "Full precision", *expectation_lines(run)]
    missing = [need.what for need in needs if need.state == MISSING]
    lines.append(f"Missing: {', '.join(missing)}" if missing else "Nothing is missing.")
    return "\n".join(lines), not missing


def task_without_download(settings: Settings) -> Task:
    """Return the task with those of its weights that are on this machine."""
    part = dict(settings["task"])
    for name, files in _hub_files(settings).items():
        if _is_on_hub(settings, name):
            place = weights.local(part[name], files)
            part[name] = None if place is None else str(place)
    task: Task = build_part(part)
    return task


def _hub_files(settings: Settings) -> Mapping[str, Sequence[str]]:
    """Return what the task reads of a hub repository, by the entry that may name one; most tasks fetch nothing."""
    module = importlib.import_module(settings["task._target_"].rpartition(".")[0])
    files: Mapping[str, Sequence[str]] = getattr(module, "PARTS", {})
    return files


def _is_on_hub(settings: Settings, name: str) -> bool:
    """Say whether an entry of the task, ``path`` or ``first_stage``, is a name on the hub that it can fetch."""
    given = settings["task"].get(name)
    return given is not None and name in _hub_files(settings) and weights.is_hub_name(str(given))


def _device(settings: Settings) -> str:
    named = str(settings["device"])
    return ("cuda" if torch.cuda.is_available() else "cpu") if named == "auto" else named


def needs_of(run: Run) -> Iterator[Need]:
    """Return everything that a run needs, in the order in which it would be missed.

    Raises EdadmError for a metric that does not exist, or whose settings the group ``metrics`` does not have.
    """
    yield _weights(run)
    if _is_unknown(run):
        return
    yield from _parts(run)
    has_prompts = "prompts" in run.settings["task"] and (run.task.own is None or run.task.own.takes_prompts)
    if has_prompts:
        yield _package("transformers", "text")
        yield _prompts(run)
    yield from needs_of_metrics(run, has_prompts)
    if _size(run) is not None:
        yield _memory(run)
    if _collects(run):
        yield _trajectories(run)
    yield _disk(run)


def _is_unknown(run: Run) -> bool:
    """Say whether the files that would tell what a user's pipeline needs are not here."""
    return run.settings["task.name"] == PIPELINE and run.task.own is None


def _size(run: Run) -> tuple[float, float] | None:
    """Return parameters and multiply-accumulates of one row, None for an embedded model; no weights are read."""
    model = run.settings["model"]
    if "parameters" in model:
        return float(model["parameters"]), float(model["macs"])
    return None if run.task.own is None else run.task.own.size()


def _weights(run: Run) -> Need:
    given = run.settings["model.path"]
    try:
        place = run.task.location()
    except EdadmError:
        wanted = "model.path is not set" if given is None else f"model.path={given} does not exist"
        remedy = run.task.remedy
        if _is_on_hub(run.settings, "path"):
            return Need("weights", FETCHED, f"{given} on the hub, needs a network")
        return Need("weights", MISSING, wanted, remedy)
    try:
        return Need("weights", HERE, f"{place} ({_whole_bytes(place) / 1e9:.1f} GB)")
    except EdadmError as error:
        return Need("weights", MISSING, str(error))


def _whole_bytes(place: Path) -> int:
    """Return the size of a file or folder of weights. Raises EdadmError for one that is cut short."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    for file in files:
        if file.suffix in WEIGHTS:
            require_whole(file)
    return sum(file.stat().st_size for file in files)


def _parts(run: Run) -> Iterator[Need]:
    told = run.task.weights is None or not run.task.weights.exists()  # with the weights, how to get all parts
    for place in run.task.others:
        if place.exists():
            yield Need("part", HERE, str(place))
        else:
            yield Need("part", MISSING, f"{place} does not exist", "" if told else run.task.remedy)
    if "first_stage" in run.settings["task"] and not (told or run.task.others):
        yield from _first_stage(run)


def _first_stage(run: Run) -> Iterator[Need]:
    """Return the need for an autoencoder that the weights do not hold and that is not here."""
    given = run.settings["task.first_stage"]
    if given is not None:
        yield Need("part", FETCHED, f"{given} on the hub, needs a network")
    elif not (run.task.location() / "vae").is_dir():
        yield Need(
            "part", MISSING, f"{run.task.location()} has no autoencoder", "set model.first_stage to a folder of it"
        )


def _package(name: str, extra: str) -> Need:
    if importlib.util.find_spec(name) is None:
        return Need("package", MISSING, name, f"pip install 'edadm[{extra}]'")
    return Need("package", HERE, name)


def _prompts(run: Run) -> Need:
    assert run.task.conditions is not None
    try:
        conditions: Any = run.task.conditions()
    except EdadmError as error:
        return Need("prompts", MISSING, str(error))
    own = getattr(conditions, "own", conditions)
    return Need("prompts", HERE, f"{len(own.evaluated)} to evaluate, {len(own.calibration)} others to calibrate")


def _memory(run: Run) -> Need:
    size = _size(run)
    assert size is not None
    needed = 4 * COPIES * size[0] + WORKING_MEMORY
    if not run.device.startswith("cuda"):
        return Need("GPU", "none", f"runs on {run.device}; about {needed / 1e9:.0f} GB of memory, and slow")
    if not torch.cuda.is_available():
        return Need(
            "GPU", MISSING, f"device={run.device}: torch sees no GPU here; about {needed / 1e9:.0f} GB of it needed"
        )
    name, there = torch.cuda.get_device_name(run.device), torch.cuda.get_device_properties(run.device).total_memory
    return Need(
        "GPU", HERE if there > needed else MISSING, f"{name}, {there / 1e9:.0f} GB; about {needed / 1e9:.0f} needed"
    )


def _collects(run: Run) -> bool:
    """Say whether the calibration rows of a run are chosen from trajectories."""
    return run.has_network and not (run.loaded or run.calibration_file)


def _trajectories(run: Run) -> Need:
    inputs, features = trajectory_bytes(run)
    needed, free = inputs + features, memory.free_bytes(run)["host"]
    there = "" if math.isinf(free) else f"{free / 1e9:.0f} GB free, "
    what = f"{there}about {needed / 1e9:.1f} GB needed for trajectories, {features / 1e9:.1f} of it features"
    remedy = "" if needed < free else "choose fewer rows (profile.rows) or a smaller chunk"
    return Need("host memory", HERE if needed < free else MISSING, what, remedy)


def trajectory_bytes(run: Run) -> tuple[int, int]:
    """Return about how many bytes the inputs and the features of the trajectories of a run take; no weights are read.

    A feature that the configuration of the model does not name counts nothing: its size shows as the run starts.
    """
    model, own, (_, *size) = run.settings["model"], run.task.own, run.task.sample_shape
    if own is not None:
        numbers = own.feature_numbers(run.feature)
    elif run.feature in model["features"].values():
        numbers = FEATURE_NUMBERS.get(model["name"], 0) * math.prod(size)
    else:
        numbers = 0
    return memory.trajectory_bytes(run, numbers, 2 if _guides(run, run.calibration_sampling) else 1)


def _disk(run: Run) -> Need:
    needed, root = disk_bytes(run), cache_root()
    there = next(place for place in (root, *root.parents) if place.exists())
    free = shutil.disk_usage(there).free
    remedy = "" if free > needed else "set EDADM_CACHE to a larger disk"
    what = f"{free / 1e9:.0f} GB free in {root}, about {needed / 1e9:.1f} GB needed"
    return Need("disk", HERE if free > needed else MISSING, what, remedy)


def disk_bytes(run: Run) -> float:
    """Return about how many bytes a run writes: trajectories and rows, images of both networks, quantized network."""
    settings, shape = run.settings, run.task.sample_shape
    side = 1 if run.task.decoder is None else getattr(run.task.decoder, "side", 8 if shape[0] == 4 else 4)
    image = 3 * shape[1] * shape[2] * side**2
    rows = 4 * settings["profile.rows"] * math.prod(shape)
    trajectories = sum(trajectory_bytes(run)) + rows if _collects(run) else 0
    size = _size(run)
    network = 0.0 if size is None else 4 * size[0]
    return 3 * settings["n_images"] * image + trajectories + network


def time_lines(run: Run) -> list[str]:
    """Return the estimated time of every stage, good to a factor of about three."""
    size = _size(run)
    macs = run.settings["model"].get("macs") if size is None else size[1]
    if macs is None:  # an embedded model: it is here, and quick
        seconds = seconds_per_row(run)
    else:
        copies = 2 if _guides(run, run.settings["sampler"]) else 1
        seconds = copies * float(macs) / (EFFICIENCY * _products_per_second(run.device))
    lines = [f"  {stage:<12} about {duration(passes * seconds)}" for stage, passes in stage_passes(run).items()]
    lines.append(f"  full precision adds its own images: about {duration(_images(run) * seconds)}, once")
    return [*lines, f"  {beside}"] if (beside := not_counted(run)) else lines


def _guides(run: Run, sampling: Mapping[str, Any]) -> bool:
    """Say whether every sample is two rows of the network."""
    own = run.task.own
    if own is None:
        return float(sampling["guidance_scale"]) != 1
    return own.guidance_scale != 1 and not own.embeds_guidance


def _images(run: Run) -> int:
    return run.settings["n_images"] * len(run.sampler.timesteps)


def _products_per_second(device: str) -> float:
    """Return multiply-accumulates per second of a matrix product in float32 on this machine."""
    side = 4096 if device.startswith("cuda") else 768
    one = torch.ones(side, side, device=device)
    (one @ one).sum().item()
    started, repeats = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        (one @ one).sum().item()
        repeats += 1
    return repeats * side**3 / (time.perf_counter() - started)


def expectation_lines(run: Run) -> list[str]:
    """Return what full precision should score, and from which value on nothing else should be trusted."""
    band = run.expected_band
    lines = [
        f"  {name}: {(low + high) / 2:.4g} expected; below {low:.4g} or above {high:.4g} stop and find out why"
        for name, (low, high) in band.items()
    ]
    if not lines and run.task.expected_band:
        return [
            f"  no score is known of these images: the task's is of profile={run.task.expected_profile}, its number of "
            "images, its own sampler, steps and guidance, and its own metrics"
        ]
    return lines or ["  no published score is expected of it"]
