"""One run from its settings to its record, stage by stage.

task -> fp trajectories -> calibration rows -> quantized model -> images -> metrics -> record
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edadm import compare, config, cost, journal, preflight, records, sample_grid, stages, tracking
from edadm.comparison import read_all_draws
from edadm.config import Settings
from edadm.diagnostics import registry as diagnostics
from edadm.environment import check_torchvision
from edadm.errors import EdadmError
from edadm.estimate import announcement
from edadm.keys import Run
from edadm.parts import build_part
from edadm.quant import io
from edadm.quant.families import family_of
from edadm.quant.network import QuantModel, Site
from edadm.records import Record
from edadm.report.figures import STEP_CURVE, step_curves
from edadm.report.render import markdown
from edadm.report.table import family, tables
from edadm.sampling.noise import EVALUATION
from edadm.store import Store, atomic_file
from edadm.tasks.base import Task

logger = logging.getLogger(__name__)

SHARED_WITH_FP = (
    "task", "model", "dataset", "sampler", "metrics", "profile", "recipe", "n_images", "chunk", "precision",
    "evaluation_seed", "threads", "tf32", "device", "results", "reference", "logger", "protocol",
)  # fmt: skip
NOT_RECORDED = (
    "logger", "launcher", "results", "reference", "device", "check", "sites", "save_calibration_set", "recipe",
    "diagnostics",
)  # fmt: skip
Keep = Callable[[str, stages.Result], stages.Result]
OWN_THREADS = torch.get_num_threads()  # of this process before a run has set its own
ATTENTION_PRODUCTS = ("product0", "product1")  # q k^T and softmax v, as cost.measure names them


def prepare(settings: Settings, sweep: str | None = None) -> Run:
    """Return a run whose parts, files and folders are checked; nothing long has happened then.

    Raises EdadmError for what cannot be run.
    """
    check_torchvision()
    diagnostics.check(settings["diagnostics"])
    device, threads = set_machine(settings)
    task = build_part(settings["task"])
    if settings["load"]:
        settings = _of_loaded_model(settings, task)
    if settings["images"]:
        variant = {"images": settings["images"]}
        settings = dataclasses.replace(settings, values={**settings.values, "method": "images"}, variant=variant)
    run = Run(settings, task, Store(), device, threads, sweep)
    if run.calibration_file:
        stages.stored_rows(run)
    _check_writable(run.results, f"results={run.results}", "results")
    if settings["save_calibration_set"]:
        _check_calibrates(run)
    logger.debug("run %s", run.hash)
    return run


def set_machine(settings: Settings) -> tuple[str, int]:
    """Set what torch computes with, and return the device and the number of threads.

    Where the settings name no threads, those are torch's own number, whatever an earlier run of this process had. TF32
    is off unless asked for: it halves the digits of a float32 product without a word. A GPU takes the convolutions that
    give the same bits every time.
    """
    device, threads = device_named(settings["device"]), settings["threads"] or OWN_THREADS
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings["tf32"]
    torch.backends.cudnn.deterministic = True
    return device, threads


def device_named(name: str) -> str:
    """Return the device of a name, which may be auto. Raises EdadmError for a GPU that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EdadmError(f"device={name}: torch sees no GPU here; use device=cpu, or device=auto")
    return name


def _of_loaded_model(settings: Settings, task: Task) -> Settings:
    """Return the settings with bits, method and seed of a saved quantized model.

    Raises EdadmError when there is none, for one of another task, and of another class than the user's pipeline has.
    """
    folder = Path(settings["load"]).expanduser()
    saved = io.read_description(folder)
    if saved.get("task", settings["task.name"]) != settings["task.name"]:
        raise EdadmError(
            f"load={folder} is a quantized model of task {saved['task']}, this is task {settings['task.name']}: choose "
            f"task={saved['task']}"
        )
    if task.own is not None and saved["model_class"] != task.own.denoiser_class:
        raise EdadmError(f"load={folder} holds a {saved['model_class']}, the pipeline has a {task.own.denoiser_class}")
    values = {
        **settings.values,
        "bits": saved["bits"],
        "method": saved.get("method", "loaded"),
        "seed": saved.get("seed", 0),
    }
    return dataclasses.replace(settings, values=values, variant=saved.get("variant", {}) | {"load": str(folder)})


def _check_writable(folder: Path, what: str, word: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdadmError(f"{what} cannot be made: {error.strerror or error}; choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EdadmError(f"{what} cannot be written: choose another folder with {word}=...")


def _check_calibrates(run: Run) -> None:
    """Raise EdadmError for a run without calibration rows of its own, or with a file for them that cannot be made."""
    word = "save_calibration_set"
    if run.loaded or not run.has_network:
        raise EdadmError(f"{word}={run.settings[word]}: nothing is calibrated by {run.settings.label}, leave it out")
    _check_writable(_calibration_target(run).parent, f"the folder of {word}={run.settings[word]}", word)


def execute(run: Run, *, announce: bool = True) -> Path:
    """Make a run and its diagnostics, or find them made, and return the file of the record."""
    path = _execute(run, announce)
    if run.settings["profile.verdict"]:
        for reason in compare.complete([records.read(path)], path.parent.parent, run.store, run.references):
            logger.info("not resampled: %s", reason)
    diagnostics.diagnose(run)
    return path


def _baseline(run: Run) -> Run | None:
    """Return the full-precision run that a run is compared with, None where there is none."""
    return None if run.is_full_precision or run.images_folder else full_precision(run)


def _execute(run: Run, announce: bool) -> Path:
    """Make a run, or find it made, and return the file of its record; say first what it will cost."""
    path = records.find_finished([run.results, *run.references], run.task.name, run.hash)
    if path is not None:
        logger.info("%s: record %s is there, nothing is computed", run.settings.label, path)
        if run.settings["save_calibration_set"]:
            _save_calibration_set(run, calibrate(run))
        if not path.with_suffix(".png").exists():
            sample_grid.draw_again(run, _baseline(run), path)
        _push(run, records.read(path))
        return path
    preflight.check(run)
    baseline = _baseline(run)
    if announce and not run.images_folder:
        logger.info("%s", announcement(run, baseline))
    journal.start_run(run.results, run.hash, " ".join(run.settings.overrides), run.sweep)
    done: dict[str, stages.Result] = {}

    def keep(key: str, result: stages.Result) -> stages.Result:
        done[key] = result
        journal.update_run(run.results, run.hash, result.name, {key: run.hash_of(key)})
        return result

    if baseline is not None:
        _execute_baseline(baseline)
    network = None
    if run.has_network and not run.loaded:
        calibrated = calibrate(run, keep)
        if run.settings["save_calibration_set"]:
            _save_calibration_set(run, calibrated)
        network = keep("quantized", stages.quantized(run, calibrated))
    sampled = keep("images", stages.images(run, network))
    steps = None
    if run.compares_steps:
        along = keep("evaluation", stages.evaluation(run))
        steps = keep("sqnr", stages.sqnr(run, network, along))
    reference = None if baseline is None else stages.images(baseline, None)
    scores = keep("metrics", stages.metrics(run, sampled, reference, steps))
    record = _record(run, done, scores.info["metrics"], _sites(run, network), sample_grid.draw(run, sampled, reference))
    path = records.write(record, run.results)
    journal.finish_run(run.results, run.hash, "ok")
    _push(run, record)
    return path


def _execute_baseline(baseline: Run) -> None:
    try:
        execute(baseline, announce=False)
    except Exception as error:
        journal.finish_run(
            baseline.results, baseline.hash, "failed", str(error).splitlines()[0] if str(error) else None
        )
        raise


def full_precision(run: Run) -> Run:
    """Return the run of the full-precision model on the same noise, the first row of every table."""
    words = [word for word in run.settings.overrides if _group_of(word) in SHARED_WITH_FP] + ["method=fp"]
    return prepare(config.settings(config.compose(words), words), run.sweep)


def _group_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


def record_failure(run: Run, status: str, reason: str) -> Path:
    """Write the record of a run that ended without a result. status: diverged or failed."""
    journal.finish_run(run.results, run.hash, status, reason.splitlines()[0])
    return records.write(_record(run, {}, {}, [], {}, status=status, reason=reason), run.results)


def _record(
    run: Run,
    done: Mapping[str, stages.Result],
    metrics: Mapping[str, Any],
    sites: Sequence[Mapping[str, Any]],
    outputs: Mapping[str, str],
    status: str = "ok",
    reason: str | None = None,
) -> Record:
    settings = run.settings
    return Record(
        hash=run.hash,
        task=run.task.name,
        method=settings["method"],
        bits=records.Bits("fp" if run.is_full_precision else settings.bits_name, **dataclasses.asdict(run.bits)),
        scope=settings["scope.name"],
        preset=settings["preset.name"],
        profile=settings["profile.name"],
        seed=settings["seed"],
        n_images=next((int(result["n"]) for name, result in metrics.items() if name != "sqnr"), settings["n_images"]),
        status=status,
        reason=reason,
        precision=settings["precision"],
        **{slot: settings[f"{slot}.name"] for slot in config.SLOTS if slot != "optimization"},
        optimization=settings["optimization.name"] if settings.reconstructs else "none",
        sweep=run.sweep,
        variant=dict(settings.variant),
        overrides=list(settings.overrides),
        protocol=run.protocol,
        config=_recorded(settings.values) | _calibration_sampling(run),
        metrics=_with_curve(metrics),
        expected_band={name: list(band) for name, band in run.expected_band.items()},
        cost=_cost(run, sites) if status == "ok" and not run.images_folder else {},
        stages={result.name: result.cost for result in done.values()},
        artefacts={key: run.hash_of(key) for key in done},
        outputs=dict(outputs),
        sites=[dict(site) for site in sites],
        provenance=records.provenance(run.device),
    )


def _calibration_sampling(run: Run) -> dict[str, Any]:
    """Return how the calibration trajectories of a run were sampled, also where that is as the images are."""
    calibrates = run.has_network and not (run.loaded or run.calibration_file)
    return {"calibration_sampler": dict(run.calibration_sampling)} if calibrates else {}


def _recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without what changes no result, such as where cached tensors lay."""
    group, key = config.CACHE
    recorded = {name: value for name, value in values.items() if name not in NOT_RECORDED}
    return recorded | {group: {name: value for name, value in values[group].items() if name != key}}


def _with_curve(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics with the error of every step as an entry of its own, which figures read."""
    found = {name: dict(result) for name, result in metrics.items()}
    if curve := found.get("sqnr", {}).pop("per_step", None):
        steps = {key: found["sqnr"].pop(key) for key in ("timesteps", "per_step_interval")}
        found[STEP_CURVE] = {"values": curve, "n": found["sqnr"]["n"], "unit": "dB", **steps}
    return found


def _sites(run: Run, network: stages.Result | None) -> list[dict[str, Any]]:
    if run.loaded:
        return [dataclasses.asdict(site) for site in io.load(run.loaded).sites()]
    return list(network.info["sites"]) if network is not None else []


def _cost(run: Run, sites: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return bit operations of one network call, without its second row under guidance, and the size.

    Layers that the original network has once are counted once.
    """
    network = run.task.denoiser()
    family = family_of(network)
    copies = family.copies(network)
    sites = [site for site in sites if site["name"].rpartition(".")[0] not in copies]
    bits = {site["name"]: site["bits"] for site in sites}
    x = torch.zeros(1, *run.task.sample_shape)
    condition: Mapping[str, torch.Tensor] = {}
    if run.guidance is not None:
        condition = run.guidance.conditions.rows(EVALUATION, run.settings["evaluation_seed"], [0])
    t = torch.zeros(1, dtype=torch.int64)
    measured = cost.measure(network, x, timestep=t, **condition)
    layers = [_with_bits(layer, bits) for layer in measured if layer.name not in copies]
    quantizers = sum(site["kind"] != "weight" and site["bits"] < config.OFF for site in sites)
    return cost.bit_operations(layers) | cost.model_size(layers, family.parameters(network), act_quantizers=quantizers)


def _with_bits(layer: cost.Layer, bits: Mapping[str, int]) -> cost.Layer:
    module, _, product = layer.name.rpartition(".")
    if product in ATTENTION_PRODUCTS:
        operands = ("q", "k") if product == ATTENTION_PRODUCTS[0] else ("w", "v")
        first, second = (bits.get(f"{module}.matmul.{operand}", cost.FP_BITS) for operand in operands)
        return dataclasses.replace(layer, weight_bits=first, act_bits=second)
    return dataclasses.replace(
        layer,
        weight_bits=bits.get(f"{layer.name}.weight_quantizer", cost.FP_BITS),
        act_bits=bits.get(f"{layer.name}.act_quantizer", cost.FP_BITS),
        groups=2 if f"{layer.name}.weight_quantizer_0" in bits else 1,
    )


def calibrate(run: Run, keep: Keep = lambda key, result: result) -> stages.Result:
    """Return the calibration rows of a run, from trajectories or the user's file; keep: is told of every stage."""
    source = None if run.calibration_file else keep("trajectories", stages.trajectories(run))
    return keep("calibration", stages.calibration(run, source))


def _calibration_target(run: Run) -> Path:
    return Path(run.settings["save_calibration_set"]).expanduser().absolute()


def _save_calibration_set(run: Run, calibrated: stages.Result) -> None:
    target = _calibration_target(run)
    with atomic_file(target) as temporary:
        shutil.copyfile(calibrated.folder / stages.CALIBRATION, temporary)
    logger.info("calibration set: %s", target)


def _push(run: Run, record: Record) -> None:
    if run.settings["logger.name"] == "wandb":
        tracking.push(record, records.pictures(record, [run.results]))


def sites_table(run: Run) -> str:
    """Return every quantized site of a run with role, kind, bits and unit as a text table."""
    network = io.load(run.loaded) if run.loaded else QuantModel.wrap(run.task.denoiser(), run.bits, run.plan)
    names = [field.name for field in dataclasses.fields(Site)]
    lines = [names] + [[str(getattr(site, name)) for name in names] for site in network.sites()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def summary(paths: Sequence[Path], curve: Path | None = None) -> str:
    """Return the table of some records, their full-precision row included, and where everything is.

    curve: the file that receives the error of every sampling step of these records.
    """
    chosen = {path: records.read(path) for path in paths}
    families = {family(record) for record in chosen.values()}
    everything = records.read_all({path.parent for path in paths})
    baselines = [record for record in everything if record.is_fp and family(record) in families]
    shown = {record.hash: record for record in [*baselines, *chosen.values()]}
    draws = read_all_draws({path.parent for path in paths})
    lines = [markdown(tables(shown.values(), draws)).rstrip(), ""]
    lines += [
        f"Records: {folder}/<hash>.json, samples beside them (.png)" for folder in sorted({p.parent for p in paths})
    ]
    if curve is not None and any(STEP_CURVE in record.metrics for record in chosen.values()):
        lines.append(f"Error of every sampling step: {step_curves(chosen.values(), curve)}")
    return "\n".join(lines)
