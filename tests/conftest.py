from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # runs with two threads beside another worker: do not spin
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, read when it is imported: beside another worker they spin
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # before edadm notes torch's own number


@pytest.fixture(autouse=True)
def _one_thread():
    """A run sets the number of threads of its process: the next test starts with one again."""
    torch.set_num_threads(1)


def golden_root() -> Path:
    """The folder that holds ``eda_ddim/``: EDADM_GOLDEN, else ../shared/golden, else the committed small vectors."""
    if named := os.environ.get("EDADM_GOLDEN"):
        return Path(named)
    beside = ROOT.parent / "shared" / "golden"
    return beside if beside.is_dir() else ROOT / "tests" / "golden" / "data"


@pytest.fixture(scope="session")
def golden() -> Path:
    return golden_root()


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how many golden cases ran and how many were skipped: a green run without them proves little."""
    counts = {
        outcome: sum(
            getattr(report, "nodeid", "").startswith("tests/golden/")
            for report in terminalreporter.stats.get(outcome, [])
        )
        for outcome in ("passed", "failed", "skipped")
    }
    terminalreporter.write_line("golden cases: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
