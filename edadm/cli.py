"""What ``run.py`` does around one run: messages, exit codes, and the end of a sweep.

A job of a sweep never stops the others: its outcome goes to a small file in Hydra's folder of the job, and the end of
the sweep prints the table, draws the curves and sets the exit code. An experiment (``experiments=table6_ablation``) is
a sweep over the superset of a table's runs, of which a job that no row of the table asks for is dropped.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import edadm.config  # noqa: F401  (registers the resolvers that conf/ uses)
from edadm.errors import Diverged, EdadmError
from edadm.report import experiment_file
from edadm.report.experiment_file import Experiment

if TYPE_CHECKING:
    from edadm.config import Settings
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
    from edadm import config as configuration

    hydra = HydraConfig.get()
    in_sweep = hydra.mode == RunMode.MULTIRUN
    experiment = _experiment(hydra.runtime.choices, config)
    if experiment is not None and not experiment.asks_for(hydra.overrides.task):
        return OK
    overrides = configuration.words_of_run(hydra.overrides.task)
    if in_sweep:
        logger.info("#%s: %s", hydra.job.num, " ".join(overrides))
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
        settings = configuration.settings(config, overrides)
        if settings["check"]:
            return _checked(settings, job)
        run = experiment.prepare(settings, sweep)
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


def _checked(settings: Settings, job: str) -> tuple[Outcome, int]:
    """Print what a run needs; the exit code says whether it is all there."""
    from edadm import requirements

    text, complete = requirements.report(settings)
    print(text)
    if complete:
        return Outcome(job, "ok"), OK
    return Outcome(job, "incomplete", "something that it needs is missing: see above"), REFUSED


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
        """Announce the jobs, so that ``python -m edadm.results status`` knows what is still to come.

        A sweep without any job ends here, with a message and exit code 2.
        """
        from edadm import config as configuration
        from edadm import experiment, journal

        try:
            chosen = jobs_of(config)
        except EdadmError as error:
            print(error, file=sys.stderr)
            raise SystemExit(REFUSED) from error
        jobs = []
        for words in chosen:
            try:
                settings = configuration.settings(configuration.compose(words), words)
                jobs.append((experiment.prepare(settings).hash, " ".join(words)))
            except EdadmError:  # the job itself will say why
                continue
        logger.info("%d runs", len(chosen))
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
        experiment = _experiment(config.hydra.runtime.choices, config)
        if experiment is not None:
            scale = "" if experiment.scale == experiment_file.SCALES[0] else f" --scale {experiment.scale}"
            print(f"Beside the paper: python -m edadm.report {experiment.name}{scale}")
        if any(outcome.status != "skipped" for outcome in failures):
            raise SystemExit(FAILED)


def _experiment(choices: Mapping[str, Any], config: DictConfig) -> Experiment | None:
    """Return the experiment that a configuration chooses, None without one."""
    name = choices.get(experiment_file.GROUP)
    return None if name is None else experiment_file.load(name, config.scale)


def jobs_of(config: DictConfig) -> list[list[str]]:
    """Return the words of the runs that a sweep makes, without those that choose its experiment.

    Raises EdadmError when there is none: nothing of the experiment is available yet, no row of it is left by the words
    of the command line, or it runs nothing.
    """
    from edadm import config as configuration

    experiment = _experiment(config.hydra.runtime.choices, config)
    if experiment is not None and not experiment.rows:
        raise EdadmError(f"{experiment.name} runs nothing: python -m edadm.report {experiment.name}")
    try:
        jobs = _jobs(config)
    except OmegaConfBaseException as error:  # a resolver's own words follow a prefix and precede the place
        raise EdadmError(str(error).splitlines()[0].rpartition("resolving interpolation: ")[2]) from error
    if experiment is None:
        if any(word.startswith(f"{experiment_file.GROUP}=") for job in jobs for word in job):
            raise EdadmError("one experiment at a time: each is a sweep of its own")
        return jobs
    asked = [configuration.words_of_run(job) for job in jobs if experiment.asks_for(job)]
    if not asked:
        own = " ".join(configuration.words_of_run(config.hydra.overrides.task))
        raise EdadmError(f"no row of {experiment.name} at scale={experiment.scale} asks for {own}: nothing was run")
    return asked


def _jobs(config: DictConfig) -> list[list[str]]:
    """Return the words of every job of a sweep's superset, as Hydra's basic sweeper expands them."""
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
