"""The script that takes Stable Diffusion through at its real size, on a network of exactly its structure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import stable_diffusion
from edadm.errors import EdadmError
from edadm.report.page import with_block
from tests.conftest import ROOT
from tests.tasks.narrow import UNETS

OPTIONS = ["--latent", "8", "--forward", "16"]


@pytest.mark.parametrize("cache", ["device", "disk"])
def test_every_stage_is_measured_and_the_structure_is_that_of_stable_diffusion(tmp_path: Path, cache: str) -> None:
    options = stable_diffusion.parser().parse_args([*OPTIONS, "--cache", cache])
    made = json.loads(json.dumps(stable_diffusion.measure_stages(options, tmp_path, UNETS["sd14"])))
    # 22 residual blocks, 16 transformer blocks with two projections each, 6 resamplers, 2 + 2 layers around them
    assert made["units"] == 22 + 3 * 16 + 6 + 4 == 80
    assert list(made["stages"]) == [
        "build", "weight ranges", "activation ranges", "reconstruction", "save", "load", "forward at 16 x 16",
        "sampling step",
    ]  # fmt: skip
    assert all(stage["seconds"] > 0 and stage["peak_memory_mib"] > 100 for stage in made["stages"].values())
    assert made["peak_memory_mib"] == max(stage["peak_memory_mib"] for stage in made["stages"].values())
    assert made["loaded_equals_saved"] and made["estimate"]["peak_memory_mib"] > made["estimate"]["cached_mib"]
    assert [path.name for path in tmp_path.iterdir()] == ["network"]


def test_the_table_in_the_documents_is_that_of_the_newest_record() -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    newest = max((ROOT / "results" / "cost" / "benchmarks").glob("stable_diffusion-*.json"))
    made = json.loads(newest.read_text(encoding="utf-8"))
    assert made["parameters"] == pytest.approx(859.5e6, rel=1e-4) and made["peak_memory_mib"] < 24 * 1024
    assert with_block(page, "stable diffusion", stable_diffusion.table(made) + "\n") == page


def test_the_settings_are_those_of_the_task_but_for_the_work() -> None:
    run = stable_diffusion.run_of(stable_diffusion.parser().parse_args([]))
    assert (run.bits.weight, run.bits.act, run.settings["task.name"]) == (4, 8, "coco_sd14")
    (phase,) = run.optimizer.phases()
    assert phase.iterations == 2 and phase.layer_loss_weight == 0.8 and phase.layer_loss_pass == "separate"
    assert run.sampler.timesteps[0] == 981


def test_a_network_that_changes_on_its_way_through_a_file_is_an_error(tmp_path: Path, monkeypatch) -> None:
    load = stable_diffusion.io.load

    def changed(folder):
        network = load(folder)
        network.model.conv_out.bias.data.add_(1)
        return network

    monkeypatch.setattr(stable_diffusion.io, "load", changed)
    monkeypatch.setattr(stable_diffusion, "reconstruct", lambda *a, **k: [])  # what is saved does not matter here
    options = stable_diffusion.parser().parse_args(OPTIONS)
    with pytest.raises(EdadmError, match="differs from the one that was saved"):
        stable_diffusion.measure_stages(options, tmp_path, UNETS["sd14"])
