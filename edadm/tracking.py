"""Weights & Biases from a finished record: nothing is logged while a run computes, so it can be sent at any time."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edadm.errors import EdadmError
from edadm.records import Record, to_dict
from edadm.store import cache_root

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "none"]
PROJECT = "edadm"


def push(
    record: Record, images: Sequence[Path | str] = (), mode: Mode | None = None, folder: Path | None = None
) -> Path | None:
    """Send a record to Weights & Biases and return the folder of the run, None for mode ``none``.

    The sweep is the group, the record's hash the run id; config, protocol, cost, stages and scalar metrics are the
    summary, curves are logged step by step, images (PNG files) under their names. mode None: online if a key is known,
    else offline (``wandb sync`` sends it later). folder: where W&B keeps its files, by default in the cache, never in
    the checkout. Raises EdadmError when wandb is missing or cannot send.
    """
    if mode == "none":
        return None
    wandb = _wandb()
    folder = Path(folder) if folder is not None else cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = mode or ("online" if _has_key(wandb) else "offline")
    settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(folder),
            mode=chosen,
            id=record.hash,
            resume="allow" if chosen == "online" else None,
            name=f"{record.task} {record.method} {record.bits.name} seed {record.seed}",
            group=record.sweep or record.task,
            job_type=record.method,
            tags=[record.profile, record.preset, record.scope, record.status],
            config=_config(record),
            settings=settings,
        )
        _log(wandb, run, record, [Path(image) for image in images])
        run.finish(exit_code=0 if record.status in ("ok", "skipped") else 1)
    except wandb.errors.Error as error:
        raise EdadmError(
            f"Weights & Biases did not take run {record.hash}: {error}. The record is kept: "
            "`python -m edadm.results push-wandb` sends it later"
        ) from error
    return Path(run.dir).parent


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise EdadmError("logger=wandb needs the package wandb: pip install wandb, or use logger=none") from error
    return wandb


def _has_key(wandb: Any) -> bool:
    """Say whether W&B could log in without asking."""
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def _config(record: Record) -> dict[str, Any]:
    fields = to_dict(record)
    described = ("task", "method", "bits", "scope", "preset", "profile", "seed", "n_images", "precision", "variant")
    return {name: fields[name] for name in (*described, "protocol", "config", "overrides", "provenance")}


def _log(wandb: Any, run: Any, record: Record, images: Sequence[Path]) -> None:
    """Log curves over their own step axis, pictures once, and everything scalar into the summary."""
    curves = {name: values for name, result in record.metrics.items() if (values := _curve(result))}
    for name in curves:
        run.define_metric(f"curve/{name}", step_metric="sampling_step")
    for step in range(max(map(len, curves.values()), default=0)):
        present = {f"curve/{name}": values[step] for name, values in curves.items() if step < len(values)}
        run.log({"sampling_step": step + 1, **present})
    if images:
        run.log({f"images/{path.stem}": wandb.Image(str(path)) for path in images})
    for name, value in _summary(record).items():
        run.summary[name] = value


def _summary(record: Record) -> dict[str, Any]:
    """Return every scalar of a record by a slash-separated name."""
    found: dict[str, Any] = {"status": record.status, "reason": record.reason, "hash": record.hash}
    for name, result in record.metrics.items():
        if not _curve(result):
            found[f"metrics/{name}"] = result.get("value")
            found[f"metrics/{name}/n"] = result.get("n")
            if result.get("interval"):
                found[f"metrics/{name}/low"], found[f"metrics/{name}/high"] = result["interval"]
    for stage, cost in record.stages.items():
        found[f"stages/{stage}/seconds"], found[f"stages/{stage}/peak_memory_mib"] = cost.seconds, cost.peak_memory_mib
    found |= {f"cost/{name}": value for name, value in record.cost.items() if isinstance(value, int | float)}
    found |= {"cost/quantization_seconds": record.quantization_seconds}
    return {name: value for name, value in found.items() if value is not None}


def _curve(result: Mapping[str, Any]) -> list[float]:
    values = result.get("values", result.get("value"))
    return values if isinstance(values, list) else []
