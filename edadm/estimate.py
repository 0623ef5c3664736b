"""What a run will cost, from one timed forward pass and the ratios between stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from edadm import memory
from edadm.keys import Run
from edadm.metrics.registry import INCEPTION
from edadm.progress import duration
from edadm.sampling.guidance import denoise_for
from edadm.sampling.interface import Denoise, unwrap
from edadm.sampling.noise import EVALUATION
from edadm.tasks.base import fitting, noise_prediction, require_size

Bind = Callable[[int], Denoise]  # from a number of rows to the network call that is timed
PASSES = 2  # timed after one that warms up
LARGE = (*INCEPTION, "clip", "aesthetic", "fd_dinov2")  # metrics of large networks
SLOW = 1.0  # seconds of one image
# The work of a stage in forward passes of one row, measured on cifar10_tiny on a CPU.
WEIGHT_RANGES = 150.0
ACTIVATION_RANGES = 2.5  # a calibration row
CACHING = 5.0  # a calibration row and phase: both passes, and the losses before and after
ITERATION = 5.0  # a row of a minibatch; FBR with a second pass for its layer losses:
ITERATION_SEPARATE = 8.0
QUANTIZED = 1.2  # a row through the quantized network


def stage_seconds(run: Run, seconds_per_row: float, stages: Collection[str] = ()) -> dict[str, float]:
    """Return the estimated seconds of every stage of a run that the store does not have.

    seconds_per_row: of a full-precision forward pass. stages: those that are asked for, default all. Good to a factor
    of about two.
    """
    return {
        stage: count * seconds_per_row
        for stage, count in stage_passes(run).items()
        if (not stages or stage in stages) and run.store.find(stage, run.key(stage)) is None
    }


def stage_passes(run: Run) -> dict[str, float]:
    """Return the work of every stage of a run in forward passes of one row; no weights are read."""
    settings, steps = run.settings, len(run.sampler.timesteps)
    calls = len(run.calibration_sampler.timesteps)
    rows, images, along = settings["profile.rows"], settings["n_images"], settings["metrics.sqnr_rows"]
    quantization = WEIGHT_RANGES + ACTIVATION_RANGES * rows
    for phase in run.optimizer.phases() if run.optimizer is not None else ():
        separate = phase.layer_loss_weight > 0 and phase.layer_loss_pass == "separate"
        quantization += phase.iterations * phase.batch * (ITERATION_SEPARATE if separate else ITERATION)
        quantization += CACHING * rows
    passes = {"images": images * steps * (1.0 if run.is_full_precision else QUANTIZED)}
    if run.has_network:
        passes |= {"evaluation": along * steps, "sqnr": along * steps * (1 + QUANTIZED)}
        if not run.loaded:
            passes |= {"quantized": quantization}
            if not run.calibration_file:
                passes |= {"trajectories": rows * calls}
    return {} if run.images_folder else passes


def not_counted(run: Run) -> str:
    """Say what takes time beside the denoiser's calls, which alone are estimated; empty where that is little."""
    decodes, scores = run.task.decoder is not None, any(name in LARGE for name in run.metrics)
    what = "decoding and metrics come" if decodes and scores else "decoding comes" if decodes else "metrics come"
    return f"{what} on top" if decodes or scores else ""


def seconds_per_row(run: Run) -> float:
    """Time a full-precision forward pass of the task's network and return its seconds per image.

    Under guidance this is that of two rows. A network so slow that one image takes long is timed on one image once.
    """
    return _seconds_per_row(run, _on_images(run, run.task.denoiser(run.device)))


def _on_images(run: Run, denoiser: nn.Module) -> Bind:
    """Return what makes the network call of so many of the images."""
    network, seed = noise_prediction(denoiser), run.settings["evaluation_seed"]
    return lambda rows: denoise_for(network, run.guidance, EVALUATION, seed, range(rows), run.device)


def _on_calibration_rows(run: Run, denoiser: nn.Module) -> Bind:
    """Return what makes the network call of so many calibration rows, all with the condition of the first."""
    network, sample = noise_prediction(denoiser), memory.calibration_sample(run)
    given = {name: rows[:1].to(run.device) for name, rows in zip(sample.names[1:], sample.inputs[2:], strict=True)}

    def bind(rows: int) -> Denoise:
        n = sample.copies * rows
        named = {name: row.expand(n, *row.shape[1:]) for name, row in given.items()}
        return lambda x, t: network(x.repeat(sample.copies, 1, 1, 1), timestep=t.repeat(sample.copies), **named)[:rows]

    return bind


def _seconds_per_row(run: Run, bind: Bind) -> float:
    if run.device.startswith("cuda"):  # its start-up belongs to no pass
        _seconds(run, bind, rows=1, passes=1)
    if (once := _seconds(run, bind, rows=1, passes=1)) > SLOW:
        return once
    rows = min(run.settings["chunk"], 16)
    _seconds(run, bind, rows, passes=1)
    return _seconds(run, bind, rows, PASSES)


def _seconds(run: Run, bind: Bind, rows: int, passes: int) -> float:
    denoise, shape = bind(rows), run.task.sample_shape
    x, timestep = torch.zeros(rows, *shape, device=run.device), torch.zeros(rows, device=run.device)
    with torch.no_grad(), fitting(f"the network in {run.task.weights or 'memory'}", run.task.name, shape):
        started = time.perf_counter()
        for _ in range(passes):
            output = unwrap(denoise(x, timestep))
            require_size(output, shape)
            output.sum().item()
    return (time.perf_counter() - started) / (passes * rows)


def announcement(run: Run, baseline: Run | None) -> str:
    """Return what a run is about to cost, the full-precision row included if it is not there yet.

    A line on time and one each on the memory of trajectories and of the reconstruction, where they are still to do.
    Raises EdadmError when that cannot fit.
    """
    missing = stage_seconds(run, 1.0)
    if baseline is not None:
        missing |= {f"fp {stage}": passes for stage, passes in stage_seconds(baseline, 1.0).items()}
    images = f"{run.settings['n_images']} images{_repeated_prompts(run)}"
    return _announced(run, f"{images}, {len(run.sampler.timesteps)} steps", missing, _on_images, not_counted(run))


def announcement_of_quantization(run: Run) -> str:
    """Return what `edadm.quantize` is about to cost, as `announcement` does, without what comes of images."""
    missing = stage_seconds(run, 1.0, ("trajectories", "quantized"))
    return _announced(run, f"{len(run.calibration_sampler.timesteps)} steps", missing, _on_calibration_rows)


def _announced(
    run: Run,
    what: str,
    missing: Mapping[str, float],
    binding: Callable[[Run, nn.Module], Bind],
    beside: str = "",
) -> str:
    """Return the lines on time and memory.

    missing: work of the stages to do. binding: what the network is timed on. beside: what is not in the time.
    """
    label = run.settings.label
    if not missing:
        return f"{label}: every stage is in the cache"
    denoiser = run.task.denoiser(run.device)
    rate = _seconds_per_row(run, binding(run, denoiser))
    parts = ", ".join(f"{stage} {duration(passes * rate)}" for stage, passes in missing.items())
    total = duration(sum(missing.values()) * rate)
    text = f"{label} on {run.device}: {run.settings['profile.rows']} rows, {what}; about {total} ({parts})"
    text += f"; {beside}" if beside else ""
    if "trajectories" in missing:
        text += f"\n{memory.trajectories_line(run, denoiser)}"
    if run.optimizer is not None and "quantized" in missing:
        text += f"\n{memory.line(run, memory.need_of_denoiser(run, denoiser))}"
    return text


def _repeated_prompts(run: Run) -> str:
    """Say of how many prompts the images are, where there are fewer of them."""
    conditions: Any = None if run.guidance is None else run.guidance.conditions
    evaluated = getattr(getattr(conditions, "own", conditions), "evaluated", None)
    if evaluated is None or len(evaluated) >= run.settings["n_images"]:
        return ""
    return f" of {len(evaluated)} prompts, each used several times"
