"""Quantize a diffusion model, sample it, score it: ``python run.py --help``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from edadm.cli import run_job
from edadm.config import offer_experiments

os.environ.setdefault("EDADM_ROOT", str(Path(__file__).resolve().parent))
offer_experiments()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Run one job; Hydra calls this once per combination of a sweep."""
    if code := run_job(config):
        sys.exit(code)


if __name__ == "__main__":
    main()
