"""What ``run.py`` does around one run: messages, exit codes, and the end of a sweep.

A job of a sweep never stops the others: its outcome goes to a small file in Hydra's folder of the job, and the end of
the sweep prints the table, draws the curves and sets the exit code.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

import edadm.config  # noqa: F401  (registers the resolvers that conf/ uses)
from edadm.errors import Diverged, EdadmError

if TYPE_CHECKING:
    from edadm.keys import Run

logger = logging.getLogger(__name__)

OUTCOME = "outcome.json"
TRACEBACK_LINES = 12
OK, FAILED, REFUSED = 0, 1, 2  # exit codes


@dataclass(frozen=True)
class Outcome:
    """How one job ended: status of its record, the reason if it is not ok, and the record's file if there is one."""

    job: str
    status: str
    reason: str | None = None
    record: str | None = None


def run_job(config: DictConfig) -> int:
    """Run one composed configuration and return the exit code; in a sweep always 0, `SweepEnd` sets it there."""
    hydra = HydraConfig.get()
    in_sweep = hydra.mode == RunMode.MULTIRUN
    overrides = list(hydra.overrides.task)
    outcome, code = _guarded(config, overrides, Path(hydra.sweep.dir).name if in_sweep else None)
    if not in_sweep:
        if outcome.status == "ok" and outcome.record:
            _show([Path(outcome.record)])
        return code
    folder = Path(hydra.runtime.output_dir)
    (folder / OUTCOME).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    return OK


def _guarded(config: DictConfig, overrides: list[str], sweep: str | None) -> tuple[Outcome, int]:
    """Run and turn every exception into an outcome; a message for the user's mistakes, a traceback for ours."""
    from edadm import config as configuration
    from edadm import experiment

    job = " ".join(overrides) or "(defaults)"
    run = None
    try:
        run = experiment.prepare(configuration.settings(config, overrides), sweep)
        if run.settings["sites"]:
            print(experiment.sites_table(run))
            return Outcome(job, "ok"), OK
        return Outcome(job, "ok", record=str(experiment.execute(run))), OK
    except configuration.Skipped as error:
        status, reason, code = "skipped", str(error), OK if sweep else REFUSED
    except Diverged as error:
        status, reason, code = "diverged", str(error), FAILED
    except EdadmError as error:
        status, reason, code = "failed", str(error), REFUSED
    except Exception as error:
        trace = traceback.format_exc()
        status, reason, code = "failed", f"{type(error).__name__}: {error}", FAILED
        print(trace, file=sys.stderr)
        reason += "\n" + "\n".join(trace.splitlines()[-TRACEBACK_LINES:])
    print(f"{status}: {reason.splitlines()[0] if code == FAILED else reason}", file=sys.stderr)
    return Outcome(job, status, reason, _record_failure(run, status, reason)), code


def _record_failure(run: Run | None, status: str, reason: str) -> str | None:
    """Write the record of a run that got as far as having a hash."""
    from edadm import experiment

    try:
        return None if run is None else str(experiment.record_failure(run, status, reason))
    except EdadmError as error:  # for example a full disk: the reason was printed, nothing is lost
        logger.error("the failure could not be recorded: %s", error)
        return None


class SweepEnd(Callback):
    """Announce a sweep; at its end print the table, draw the curves and exit with 1 if a job failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Announce the jobs, so that ``python -m edadm.results status`` knows what is still to come."""
        from edadm import config as configuration
        from edadm import experiment, journal

        jobs = []
        for words in _jobs(config):
            try:
                settings = configuration.settings(configuration.compose(words), words)
                jobs.append((experiment.prepare(settings).hash, " ".join(words)))
            except EdadmError:  # the job itself will say why
                continue
        journal.announce_sweep(Path(config.results), Path(config.hydra.sweep.dir).name, jobs)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the outcomes of the jobs from Hydra's folder of the sweep."""
        outcomes = [
            Outcome(**json.loads(path.read_text(encoding="utf-8")))
            for path in sorted(Path(config.hydra.sweep.dir).glob(f"*/{OUTCOME}"), key=_job_number)
        ]
        records = [Path(outcome.record) for outcome in outcomes if outcome.record]
        try:
            if records:
                _show(records, Path(config.results) / f"{Path(config.hydra.sweep.dir).name}.png")
        except Exception:
            logger.exception("the table could not be printed; the records are in %s", config.results)
        failures = [outcome for outcome in outcomes if outcome.status != "ok"]
        for outcome in failures:
            print(f"{outcome.status}: {outcome.job}: {(outcome.reason or '').splitlines()[0]}", file=sys.stderr)
        if any(outcome.status != "skipped" for outcome in failures):
            raise SystemExit(FAILED)


def _jobs(config: DictConfig) -> list[list[str]]:
    """Return the words of every job of a sweep, as Hydra's basic sweeper expands them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides(words + list(config.hydra.overrides.task))
    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


def _job_number(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return (int(name) if name.isdigit() else sys.maxsize, name)


def _show(paths: list[Path], curve: Path | None = None) -> None:
    """Print the table of some records and say where they and their pictures are."""
    from edadm import experiment

    print(experiment.summary(paths, curve))
