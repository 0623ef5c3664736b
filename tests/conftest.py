from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder that holds ``eda_ddim/``: EDADM_GOLDEN, else ../shared/golden, else the committed small vectors."""
    named = os.environ.get("EDADM_GOLDEN")
    candidates = [Path(named)] if named else [ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden" / "data"]
    for candidate in candidates:
        if (candidate / "eda_ddim").is_dir():
            return candidate
    pytest.fail(f"no golden vectors in {', '.join(map(str, candidates))}: set EDADM_GOLDEN to the folder of eda_ddim/")


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how many golden cases ran and how many were skipped: a green run without them proves little."""
    counts = {
        outcome: sum(
            "tests/golden/" in getattr(report, "nodeid", "") for report in terminalreporter.stats.get(outcome, [])
        )
        for outcome in ("passed", "failed", "skipped")
    }
    terminalreporter.write_line("golden cases: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
