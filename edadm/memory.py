"""Whether trajectories and reconstruction of a run fit into memory, and where its cached tensors should lie."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from edadm.calibration.rows import CalibrationSet
from edadm.calibration.trajectories import step_times, submodule, with_features
from edadm.cost import output_numbers
from edadm.errors import EdadmError
from edadm.keys import ROWS_PER_PASS, Run
from edadm.quant.network import QuantModel
from edadm.reconstruction.cache import PLACES
from edadm.reconstruction.memory import FLOAT, Need, Plan, measure, need_at
from edadm.sampling.noise import CALIBRATION

logger = logging.getLogger(__name__)

AUTO = "auto"  # reconstruction.cache: the first place that fits
_NAMES = {"device": "GPU memory", "host": "host memory", "disk": "disk space"}


@dataclass(frozen=True)
class Sample:
    """What a network is calibrated on. inputs, names: as `edadm.reconstruction.reconstruct` takes them, some rows.

    rows: of the network, guidance included. copies: of them for each calibration row, two under guidance.
    """

    inputs: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    rows: int
    copies: int


def calibration_sample(run: Run) -> Sample:
    """Return a sample of the calibration rows of a run: of the user's file, else of what it will sample."""
    if run.calibration_file:
        stored, _ = CalibrationSet.load(run.calibration_file)
        x, timestep, condition = stored.inputs()
        return Sample(
            (x, timestep, *condition.values()), ("timestep", *condition), len(x), 1 if stored.null is None else 2
        )
    guidance = run.calibration_guidance
    given = {} if guidance is None else guidance.conditions.rows(CALIBRATION, run.settings["seed"], [0])
    copies = 2 if guidance is not None and guidance.guides else 1
    inputs = (torch.empty(1, *run.task.sample_shape), torch.empty(1), *given.values())
    return Sample(inputs, ("timestep", *given), copies * run.settings["profile.rows"], copies)


def trajectory_bytes(run: Run, numbers: int, copies: int) -> tuple[int, int]:
    """Return the bytes of the inputs and of the features that the full-precision trajectories of a run hold.

    numbers: of one row of the feature. copies: rows of the network for each trajectory.
    """
    steps, n = len(step_times(run.calibration_sampler)), run.settings["profile.rows"]
    kept = with_features(n, run.settings["chunk"], run.feature_batches)
    return FLOAT * steps * n * math.prod(run.task.sample_shape), FLOAT * steps * copies * kept * numbers


def trajectories_line(run: Run, denoiser: nn.Module) -> str:
    """Return what the full-precision trajectories of a run take, as text.

    They lie in host memory as they are sampled, and behind that on disk. Raises EdadmError when they fit into neither.
    """
    inputs, features = trajectory_bytes(run, _feature_numbers(run, denoiser), calibration_sample(run).copies)
    free, names = free_bytes(run), _NAMES if run.device.startswith("cuda") else _NAMES | {"host": "memory"}
    for what in ("host", "disk"):
        if inputs + features > free[what]:
            raise EdadmError(
                f"sampling the trajectories needs at least {_gib(inputs + features)} more {names[what]}, "
                f"{_gib(free[what])} are free: choose fewer rows (profile.rows), or a smaller chunk where features "
                "are of its first ones only" + (", or a larger disk (EDADM_CACHE)" if what == "disk" else "")
            )
    return (
        f"trajectories: {_gib(inputs)} of inputs and {_gib(features)} of features ({run.feature}), in "
        f"{names['host']} and on disk"
    )


def _feature_numbers(run: Run, denoiser: nn.Module) -> int:
    """Return how many numbers a row of the TDAC feature has; nothing is computed and no weight is read."""
    sample = calibration_sample(run)
    own = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*denoiser.named_parameters(), *denoiser.named_buffers())
    }
    x, *others = [torch.empty(1, *part.shape[1:], dtype=part.dtype, device="meta") for part in sample.inputs]
    named = dict(zip(sample.names, others, strict=True))
    return output_numbers(submodule(denoiser, run.feature), lambda: functional_call(denoiser, own, (x,), named))


def need_of_denoiser(run: Run, denoiser: nn.Module) -> Need:
    """Return the memory that the reconstruction of a denoiser needs. The denoiser is wrapped: it serves no one else."""
    sample = calibration_sample(run)
    network = QuantModel.wrap(denoiser, run.bits, run.plan)
    return need_of_network(run, network, sample.inputs, sample.names, sample.rows)


def need_of_network(
    run: Run, network: QuantModel, sample: Sequence[torch.Tensor], names: Sequence[str], rows: int
) -> Need:
    """Return the memory that a reconstruction needs with its cache where the configuration wants it.

    sample, names: some of the ``rows`` as `edadm.reconstruction.reconstruct` takes them. reconstruction.cache=auto
    takes the first place where everything should fit, else the first where what is known to be needed fits. Raises
    EdadmError when that does not fit at the place.
    """
    assert run.optimizer is not None
    plan = Plan(
        phases=run.optimizer.phases,
        rows=rows,
        rows_per_pass=ROWS_PER_PASS,
        range_rows=-(-rows // run.settings["profile.range_batches"]),
        cpu=not run.device.startswith("cuda"),
    )
    sizes = measure(network, sample, names, run.settings["reconstruction.granularity"])
    wanted, free = run.settings["reconstruction"].get("cache", AUTO), free_bytes(run)
    needs = [need_at(network, sizes, plan, place) for place in (PLACES if wanted == AUTO else (wanted,))]
    found = next((need for need in needs if not _shortage(need, need.peaks, free)), None)
    found = found or next((need for need in needs if not _shortage(need, need.known, free)), needs[-1])
    if shortage := _shortage(found, found.known, free):
        raise EdadmError(f"the reconstruction needs at least {shortage}: {_remedy(found)}")
    return found


def line(run: Run, need: Need) -> str:
    """Return what a reconstruction needs of memory as text, with a warning where it may not fit."""
    free, largest = free_bytes(run), need.largest
    peaks = ", ".join(f"{_gib(size)} of {_name(need, what)}" for what, size in need.peaks.items() if size)
    text = (
        f"memory: inputs and targets of up to {_gib(need.cached[largest])} a unit ({largest}; all {len(need.cached)} "
        f"units, one after the other, {_gib(sum(need.cached.values()))}) and {_gib(need.waiting)} in paused passes, "
        f"kept on the {need.place}; peak about {peaks}"
    )
    for unit, size in need.cached.items():
        logger.debug("%s: %.1f MiB of inputs and targets", unit, size / 2**20)
    if shortage := _shortage(need, need.peaks, free):
        text += f"\nWARNING: the reconstruction needs about {shortage}: {_remedy(need)}"
    return text


def free_bytes(run: Run) -> dict[str, float]:
    """Return the free memory of device and host, infinite where it is not known, and the free disk space."""
    host = _free_host()
    device = float(torch.cuda.mem_get_info(run.device)[0]) if run.device.startswith("cuda") else host
    root = run.store.root
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    return {"device": device, "host": host, "disk": float(shutil.disk_usage(place).free)}


def _free_host() -> float:
    """Return the memory that Linux can give without swapping, within the limit of a container; elsewhere infinity."""
    free = [float("inf")]
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free.append(1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        limit, used = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
        facts = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + float(facts["inactive_file"]))
    return min(free)


def _shortage(need: Need, sizes: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Return in words what of the needed sizes is not free, an empty string if all is."""
    more = {what: size - need.present[what] for what, size in sizes.items()}
    return " and ".join(
        f"{_gib(size)} more {_name(need, what)} with reconstruction.cache={need.place}, {_gib(free[what])} are free"
        for what, size in more.items()
        if size > max(free[what], 0.0)
    )


def _remedy(need: Need) -> str:
    others = [place for place in PLACES[PLACES.index(need.place) + 1 :] if place != "host" or need.peaks["host"]]
    elsewhere = f"reconstruction.cache={' or '.join(others)}, " if others else "a disk with more space (EDADM_CACHE), "
    return f"choose {elsewhere}fewer rows (profile.rows) or a smaller minibatch (profile.batch)"


def _name(need: Need, what: str) -> str:
    return _NAMES[what] if need.peaks["host"] or what == "disk" else "memory"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
