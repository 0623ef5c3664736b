"""What diagnostics are measured on: the finished stages of a run, found in the store or computed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edadm import stages
from edadm.calibration.rows import CalibrationSet
from edadm.calibration.trajectories import Trajectories
from edadm.config import OFF
from edadm.keys import Run
from edadm.metrics.paired import StepSQNR
from edadm.progress import Progress
from edadm.quant.network import QuantModel

HELD_OUT = 64  # trajectories
HELD_OUT_SEED = 10**9  # of the noise; no seed of a run


@dataclass(frozen=True)
class Inputs:
    """The stages of one run, each asked for once and only if a diagnostic needs it.

    progress: called as ``progress(stage, done, total)``.
    """

    run: Run
    progress: Progress

    @cached_property
    def trajectories(self) -> Trajectories:
        """The full-precision trajectories from which the rows of the run are, or would be, chosen."""
        return Trajectories.load(self._trajectories.folder / stages.TRAJECTORIES)

    @cached_property
    def held_out_trajectories(self) -> Trajectories:
        """Full-precision trajectories of the same sampler from noise that calibrates no run; all runs share them."""
        other = self._with(seed=HELD_OUT_SEED, profile=self.run.settings["profile"] | {"rows": HELD_OUT})
        return Trajectories.load(stages.trajectories(other).folder / stages.TRAJECTORIES)

    @cached_property
    def calibration_rows(self) -> CalibrationSet:
        """The rows that calibrated the run."""
        return CalibrationSet.load(self._calibration.folder / stages.CALIBRATION)[0]

    @cached_property
    def quantized(self) -> stages.Result | None:
        """The stage that quantized the network, None for a saved model that the run only loads."""
        return None if self.run.loaded else stages.quantized(self.run, self._calibration)

    @cached_property
    def step_errors(self) -> StepSQNR:
        """Signal and error energy of the noise prediction at every step of full-precision trajectories."""
        return stages.read_sqnr(stages.sqnr(self.run, self.quantized, stages.evaluation(self.run)))

    def full_precision_network(self) -> QuantModel:
        """Return the wrapped denoiser with nothing quantized."""
        return QuantModel.wrap(self.run.task.denoiser(self.run.device), self.run.bits, self.run.plan)

    def quantized_network(self) -> QuantModel:
        """Return the quantized network, ready for inference."""
        network = stages.load_network(self.run, self.quantized)
        assert isinstance(network, QuantModel)
        return network

    def network_of_ranges(self) -> QuantModel:
        """Return the network as it is without reconstruction: the same rows and ranges, weights rounded to nearest."""
        run = self._with(reconstruction={"name": "none", "granularity": None})
        return run.task.quantized(stages.quantized(run, self._calibration).folder, run.device)

    def _with(self, **values: Any) -> Run:
        """Return the run with other values in its configuration, for its stages alone."""
        settings = dataclasses.replace(self.run.settings, values={**self.run.settings.values, **values})
        return dataclasses.replace(self.run, settings=settings)

    @cached_property
    def _trajectories(self) -> stages.Result:
        return stages.trajectories(self.run)

    @cached_property
    def _calibration(self) -> stages.Result:
        return stages.calibration(self.run, None if self.run.calibration_file else self._trajectories)


def no_sampling(run: Run) -> str | None:
    """Say why the denoiser of a run cannot be looked at, None where it can."""
    return "its images come from a folder" if run.images_folder else None


def no_quantized_network(run: Run) -> str | None:
    """Say why a run has no quantized network, None where it has one."""
    return None if run.has_network else "nothing is quantized"


def no_errors_of_the_same_steps(run: Run) -> str | None:
    """Say why a network has no errors at the steps of the calibration trajectories, None where it has."""
    if run.has_network and run.calibration_sampling != run.settings["sampler"]:
        return "its calibration trajectories are sampled otherwise than its images"
    return no_quantized_network(run)


def no_reconstruction(run: Run) -> str | None:
    """Say why nothing is reconstructed in a run, None where something is."""
    if not run.has_network or run.loaded or run.optimizer is None:
        return "nothing is reconstructed"
    return None


def no_rounding(run: Run) -> str | None:
    """Say why no rounding is learned in a run, None where it is."""
    return "its weights stay in floating point" if run.bits.weight >= OFF else no_reconstruction(run)
