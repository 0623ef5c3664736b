"""The stages of one run: each a function of its inputs and a key, kept in the store under the hash of that key."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edadm import journal, memory
from edadm.calibration.rows import CalibrationSet
from edadm.calibration.trajectories import Trajectories, collect
from edadm.keys import ROWS_PER_PASS, Run
from edadm.metrics import inception, inception_network, networks, tiny
from edadm.metrics.images import each_image, image_files, read_file, writing_file
from edadm.metrics.inception import InceptionReference
from edadm.metrics.inception_network import InceptionNetwork
from edadm.metrics.paired import StepSQNR, sqnr_per_step
from edadm.metrics.registry import METRICS
from edadm.metrics.scored_images import Reference
from edadm.metrics.scoring import score
from edadm.progress import Meter, Progress, duration
from edadm.quant import io
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import QuantModel
from edadm.reconstruction.cache import Cache
from edadm.reconstruction.loop import UnitReport
from edadm.reconstruction.random import seeded
from edadm.reconstruction.reconstruct import reconstruct
from edadm.records import Stage
from edadm.sampling.generate import generate_chunks, sampler_noise
from edadm.sampling.guidance import denoise_for
from edadm.sampling.interface import split_variance, unwrap
from edadm.sampling.noise import EVALUATION, SELECTION, noise, numpy_rng
from edadm.store import SCRATCH, atomic_file, write_atomically
from edadm.tasks.base import noise_prediction

logger = logging.getLogger(__name__)

TRAJECTORIES, CALIBRATION = "trajectories.safetensors", "calibration.safetensors"
IMAGES, ALONG, SQNR, KEPT = "images.npy", "evaluation.npz", "sqnr.npz", "kept.npz"
REPORTS = "reports.json"
# what a killed stage goes on from
UNITS, CACHE, CHUNKS, ELAPSED = (f"{SCRATCH}/{name}" for name in ("units", "cache", "chunks", "elapsed"))


@dataclass(frozen=True)
class Result:
    """A finished stage: the folder of its artefact, what it cost when it was computed, and what it noted."""

    name: str
    folder: Path
    cost: Stage
    info: Mapping[str, Any]


Build = Callable[[Path, Progress], Mapping[str, Any] | None]


def stage(run: Run, key: str, build: Build, name: str = "") -> Result:
    """Return the artefact of a stage, computed by ``build(folder, progress)`` unless the store has it.

    build may find in its folder what a killed run left there; what it returns is kept as notes. Seconds (those of a
    killed run included) and peak memory are kept with the artefact. name: what records call the stage, default the key.
    """
    name = name or key
    reused = run.store.find(key, run.key(key)) is not None

    def measured(folder: Path) -> dict[str, Any]:
        (folder / SCRATCH).mkdir(exist_ok=True)
        journal.update_run(run.results, run.hash, name)
        meter = Meter(run.device, folder / ELAPSED)

        def pulse() -> None:
            meter.note()
            journal.show_life(run.results, run.hash)

        with meter, Progress(run.settings.label, pulse) as progress:
            notes = build(folder, progress)
        cost = {name: getattr(meter, name) for name in ("seconds", "peak_memory_mib", "other_load")}
        return cost | {"notes": dict(notes or {})}

    folder = run.store.fetch(key, run.key(key), measured, label=run.settings.label, resume=True)
    info = run.store.manifest(folder)["info"]
    how = "reused" if reused else f"{duration(info['seconds'])}, {info['peak_memory_mib']:.0f} MiB"
    logger.info("%s [%s]: %s", name, run.settings.label, how)
    cost = Stage(info["seconds"], info["peak_memory_mib"], reused, info.get("other_load"))
    return Result(name, folder, cost, info["notes"])


def trajectories(run: Run) -> Result:
    """Sample the full-precision trajectories that every calibration method and bit width of a seed shares."""

    def build(folder: Path, progress: Progress) -> None:
        collect(
            _for_inference(run.task.denoiser(run.device)),
            run.calibration_sampler,
            run.settings["profile.rows"],
            shape=run.task.sample_shape,
            seed=run.settings["seed"],
            batch=run.settings["chunk"],
            guidance=run.calibration_guidance,
            feature_module=run.feature,
            feature_batches=run.feature_batches,
            device=run.device,
            progress=partial(progress, "full-precision trajectories"),
        ).save(folder / TRAJECTORIES)

    return stage(run, "trajectories", build)


def calibration(run: Run, source: Result | None) -> Result:
    """Choose the calibration rows from trajectories, or without them take those of the user's file."""

    def build(folder: Path, progress: Progress) -> dict[str, Any]:
        if source is None:
            rows, facts = stored_rows(run)
            rows.save(folder / CALIBRATION, facts)
            return {"rows": len(rows)}
        rng = numpy_rng(SELECTION, run.settings["seed"])
        loaded = Trajectories.load(source.folder / TRAJECTORIES)
        rows, diagnostics = run.calibration.select(loaded, run.settings["profile.rows"], rng)
        names = {"task": run.task.name, "calibration": run.settings["calibration.name"]}
        rows.save(
            folder / CALIBRATION, names | {"seed": run.settings["seed"], "sampler": run.calibration_sampling["name"]}
        )
        return {"rows": len(rows), **diagnostics}

    return stage(run, "calibration", build)


def stored_rows(run: Run) -> tuple[CalibrationSet, dict[str, str]]:
    """Return the user's calibration set and its metadata. Raises EdadmError when it does not fit or is too small."""
    assert run.calibration_file is not None
    return CalibrationSet.load(run.calibration_file, min_rows=run.settings["profile.rows"], shape=run.task.sample_shape)


def quantized(run: Run, calibrated: Result) -> Result:
    """Set the ranges of the network, reconstruct it, and save it; resumes after the last finished unit."""

    def build(folder: Path, progress: Progress) -> dict[str, Any]:
        rows, _ = CalibrationSet.load(calibrated.folder / CALIBRATION)
        network = QuantModel.wrap(run.task.denoiser(run.device), run.bits, run.plan)
        set_weight_ranges(network, run.ranges)
        set_ranges = partial(_set_activation_ranges, run, network, rows, progress)
        if run.optimizer is None:
            set_ranges()
        else:
            _reconstruct(run, network, rows, folder, set_ranges, progress)
        facts = {"task": run.task.name, "method": run.settings["method"], "variant": dict(run.settings.variant)}
        io.save(network, folder, **facts, seed=run.settings["seed"])
        return {"sites": [dataclasses.asdict(site) for site in network.sites()]}

    return stage(run, "quantized", build, "ranges" if run.optimizer is None else "reconstruction")


def _set_activation_ranges(run: Run, network: QuantModel, rows: CalibrationSet, progress: Progress) -> None:
    """Show the network the rows in the few batches over which running ranges are updated."""
    x, timestep, condition = rows.inputs()
    size = -(-len(rows) // run.settings["profile.range_batches"]) * (len(x) // len(rows))
    starts = range(0, len(x), size)

    def forward(number: int) -> None:
        part = slice(starts[number], starts[number] + size)
        named = {name: tensor[part].to(run.device) for name, tensor in condition.items()}
        network(x[part].to(run.device), timestep=timestep[part].to(run.device), **named)
        progress("activation ranges", number + 1, len(starts))

    set_activation_ranges(network, run.ranges, [partial(forward, number) for number in range(len(starts))])


def _reconstruct(
    run: Run,
    network: QuantModel,
    rows: CalibrationSet,
    folder: Path,
    set_ranges: Callable[[], None],
    progress: Progress,
) -> None:
    """Reconstruct the network; every finished unit is kept in the folder, those found there are restored."""
    from safetensors.torch import load_file, save_file

    units, log = folder / UNITS, folder / REPORTS
    known = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else []
    reports = {(report["phase"], report["unit"]): report for report in known}

    def keep(key: str, state: dict[str, torch.Tensor], report: UnitReport | None) -> None:
        if report is not None:
            reports[report.phase, report.unit] = dataclasses.asdict(report)
            write_atomically(log, json.dumps(list(reports.values())))
        with atomic_file(units / f"{key}.safetensors") as temporary:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)

    assert run.optimizer is not None
    x, timestep, condition = rows.inputs()
    inputs, names = (x, timestep, *condition.values()), ("timestep", *condition)
    reconstruct(
        network,
        inputs,
        run.optimizer,
        run.settings["reconstruction.granularity"],
        seeded(run.settings["seed"]),
        set_activation_ranges=set_ranges,
        done={file.name.removesuffix(".safetensors"): load_file(file) for file in units.glob("[!.]*.safetensors")},
        on_unit=keep,
        progress=progress,
        rows_per_pass=ROWS_PER_PASS,
        cache=Cache(memory.need_of_network(run, network, inputs, names, len(x)).place, folder / CACHE),
        names=names,
    )


def images(run: Run, network: Result | None) -> Result:
    """Sample the images that are scored, in chunks that survive a kill; without a network at full precision."""

    def build(folder: Path, progress: Progress) -> None:
        n_images = run.settings["n_images"]
        made: Iterator[torch.Tensor]
        if run.images_folder:
            files = image_files(run.images_folder)[:n_images]
            n_images, made = len(files), (image[None] for image in each_image(files))
        else:
            made = generate_chunks(
                noise_prediction(load_network(run, network)),
                run.sampler,
                n_images,
                shape=run.task.sample_shape,
                seed=run.settings["evaluation_seed"],
                chunk=run.settings["chunk"],
                folder=folder / CHUNKS,
                device=run.device,
                precision=run.settings["precision"],
                guidance=run.guidance,
                to_images=run.task.to_images(run.device),
                progress=partial(progress, "sampling"),
            )
        with writing_file(folder / IMAGES, n_images) as append:
            for part in made:
                append(part)

    return stage(run, "images", build, "sampling")


def load_network(run: Run, network: Result | None) -> nn.Module:
    """Return the quantized network of a finished stage or of the user's folder, else the full-precision denoiser."""
    folder = run.loaded or (network.folder if network else None)
    return _for_inference(run.task.denoiser(run.device) if folder is None else run.task.quantized(folder, run.device))


def _for_inference(network: nn.Module) -> nn.Module:
    """Return the network with channels last, the faster layout of its convolutions on CPU and GPU."""
    return network.to(memory_format=torch.channels_last)


def read_images(result: Result) -> torch.Tensor:
    """Return the images of a finished sampling stage, uint8 (N, C, H, W), mapped from their file."""
    return read_file(result.folder / IMAGES)


def evaluation(run: Run) -> Result:
    """Sample the full-precision trajectories of the first evaluated images, on which every network is compared."""

    def build(folder: Path, progress: Progress) -> None:
        sampler, seed, shape = run.sampler, run.settings["evaluation_seed"], run.task.sample_shape
        n, calls = run.settings["metrics.sqnr_rows"], len(sampler.timesteps)
        x = torch.empty(calls, n, *shape)
        eps = torch.empty_like(x)
        denoise = noise_prediction(_for_inference(run.task.denoiser(run.device)))

        def record(rows: range, k: int, t: float, x_t: torch.Tensor, output: torch.Tensor) -> None:
            x[k, rows.start : rows.stop], eps[k, rows.start : rows.stop] = x_t.cpu(), output.cpu()
            progress("evaluation trajectories", calls * rows.start + (k + 1) * len(rows), calls * n)

        for rows in _chunks(n, run.settings["chunk"]):
            start = noise(EVALUATION, seed, rows, shape).to(run.device)
            step_noise = sampler_noise(EVALUATION, seed, rows, shape, torch.device(run.device))
            bound = denoise_for(denoise, run.guidance, EVALUATION, seed, rows, run.device)
            sampler.run(bound, start, step_noise, observe=partial(record, rows))
        _save_arrays(folder / ALONG, timesteps=sampler.timesteps, x=x.numpy(), eps=eps.numpy())

    return stage(run, "evaluation", build)


def sqnr(run: Run, network: Result | None, along: Result) -> Result:
    """Measure the error of the quantized network's noise prediction at every step of full-precision trajectories."""

    def build(folder: Path, progress: Progress) -> None:
        with np.load(along.folder / ALONG, allow_pickle=False) as file:
            timesteps, x, eps = file["timesteps"].tolist(), torch.from_numpy(file["x"]), torch.from_numpy(file["eps"])
        denoise, n = noise_prediction(load_network(run, network)), x.shape[1]
        parts = [_sqnr_of(run, denoise, timesteps, x, eps, rows) for rows in _chunks(n, run.settings["chunk"])]
        signal, error = (np.concatenate([getattr(part, name) for part in parts], 1) for name in ("signal", "error"))
        _save_arrays(folder / SQNR, timesteps=parts[0].timesteps, signal=signal, error=error)

    return stage(run, "sqnr", build)


def _sqnr_of(
    run: Run,
    denoise: Callable[..., torch.Tensor],
    timesteps: Sequence[float],
    x: torch.Tensor,
    eps: torch.Tensor,
    rows: range,
) -> StepSQNR:
    """Compare a network with the full-precision noise eps (T, N, C, H, W) at x of the same shape, for some rows."""
    seed, channels, part = run.settings["evaluation_seed"], x.shape[2], slice(rows.start, rows.stop)
    bound = denoise_for(denoise, run.guidance, EVALUATION, seed, rows, run.device)
    full_precision = iter(eps[:, part].to(run.device))  # one entry per step, and all rows of it are one batch

    def quantized_network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return split_variance(unwrap(bound(x_t, t)), channels)[0]

    return sqnr_per_step(
        lambda x_t, t: next(full_precision),
        quantized_network,
        x[:, part],
        timesteps,
        batch=len(rows),
        device=run.device,
    )


def _chunks(n: int, size: int) -> list[range]:
    """Cut the first n image numbers into chunks, as images are sampled; the last may be shorter."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _save_arrays(path: Path, **arrays: Any) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_sqnr(result: Result) -> StepSQNR:
    """Return what the stage ``sqnr`` measured."""
    with np.load(result.folder / SQNR, allow_pickle=False) as file:
        return StepSQNR(tuple(file["timesteps"].tolist()), file["signal"], file["error"])


def metrics(run: Run, sampled: Result, full_precision: Result | None, steps: Result | None) -> Result:
    """Score the images; full_precision: the images of the same noise, steps: the error of every step.

    With a profile that judges, what large networks say of every image is kept for the resampling.
    """

    def build(folder: Path, progress: Progress) -> dict[str, Any]:
        made = read_images(sampled)
        if not len(made):
            return {"metrics": {name: _nothing_to_score(name) for name in run.metrics}}
        network, inception_reference = None, None
        if run.needs_inception:
            network, inception_reference = inception_of(run.settings["metrics"], run.metrics, run.device)
        others = networks.load(run.settings["metrics"], run.metrics, run.device)
        tiny_reference = tiny.load_reference(run.tiny_reference) if run.needs_tiny else None
        kept: dict[str, np.ndarray] = {}
        scores = score(
            made,
            run.metrics,
            Reference(tiny_reference, inception_reference, others.reference),
            None if full_precision is None else read_images(full_precision),
            tiny_network=tiny.load_network(device=run.device) if run.needs_tiny else None,
            inception_network=network,
            clip_network=others.clip,
            clip_tiny_network=others.clip_tiny,
            aesthetic_network=others.aesthetic,
            dinov2_network=others.dinov2,
            prompts=run.prompts,
            crop=run.crop,
            step_sqnr=None if steps is None else read_sqnr(steps),
            seed=run.settings["evaluation_seed"],
            resamples=run.settings["metrics.bootstrap"],
            keep=kept.__setitem__ if run.settings["profile.verdict"] else None,
        )
        if kept:
            _save_arrays(folder / KEPT, **kept)
        return {"metrics": scores}

    return stage(run, "metrics", build)


def inception_of(
    settings: Mapping[str, Any], names: Collection[str], device: str
) -> tuple[InceptionNetwork, InceptionReference]:
    """Return the Inception network and the reference for the metrics asked for; settings: the group ``metrics``."""
    part = settings["inception"]
    network = inception_network.load_network(
        part["weights"], part["sha256"] or inception_network.RELEASE_SHA256, device
    )
    keep = any(name in names for name in ("kid", "precision", "recall"))
    reference = inception.reference_from(
        part["reference"], network, keep_features=keep, recursive=True, crop=settings["crop"]
    )
    return network, reference


def read_kept(result: Result) -> dict[str, np.ndarray]:
    """Return what the stage ``metrics`` kept of every image, by the names of ``draws.KEPT``."""
    path = result.folder / KEPT
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _nothing_to_score(name: str) -> dict[str, Any]:
    info = dataclasses.asdict(METRICS[name])
    return {"value": None, "n": 0, "reason": "no images: n_images is 0", "interval": None, **info}
