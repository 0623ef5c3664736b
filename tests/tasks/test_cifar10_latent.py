from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edadm import config, requirements
from edadm.errors import EdadmError
from edadm.parts import build_part
from edadm.prompts import read_captions
from edadm.sampling.noise import CALIBRATION, EVALUATION
from edadm.tasks import cifar10_latent, text
from edadm.tasks.base import Task, noise_prediction
from edadm.tasks.cifar10 import CLASSES
from edadm.tasks.cifar10_latent import DIT_PARAMS, LDM_PARAMS, PROMPTS, T2I_PARAMS
from edadm.tasks.compvis_unet import unet_config
from edadm.tasks.dit_checkpoint import dit_config
from edadm.tasks.model_folder import empty_model
from tests.conftest import ROOT
from tests.tasks.narrow_latent import FOLDERS, autoencoder_folder

TASKS = tuple(FOLDERS)
CARDS = ROOT / "results" / "cards"
SCORED = [path.stem for path in sorted(CARDS.glob("*.json")) if path.stem in config.options("task")]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """The folder of each task's narrow model, and that of the autoencoder they share."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("narrow")
    return {name: make(root / name) for name, make in FOLDERS.items()}, autoencoder_folder(root / "autoencoder") / "vae"


def task_of(name: str, *words: str) -> Task:
    line = (f"task={name}", *words)
    return build_part(config.settings(config.compose(line), line)["task"])


@pytest.mark.parametrize("name", SCORED)
def test_an_embedded_task_expects_what_its_card_says_and_other_weights_nothing(name: str, tmp_path: Path) -> None:
    card = json.loads((CARDS / f"{name}.json").read_text())
    scores = card["scores"][f"{card['guidance_scale']:g}"] if "scores" in card else card
    low, high = task_of(name).expected_band["fd_tiny"]
    assert (low + high) / 2 == pytest.approx(scores["fd_tiny"], abs=1e-3)
    assert task_of(name).expected_profile == "reference"
    assert task_of(name, f"model.path={tmp_path}").expected_band == {}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_predicts_the_noise_of_latents_and_decodes_them(name: str, places) -> None:
    folders, autoencoder = places
    task = task_of(name, f"model.path={folders[name]}", f"model.first_stage={autoencoder}")
    assert task.name == name and task.sample_shape == (4, 8, 8) and task.others == (autoencoder,)
    conditions = task.conditions()
    rows = conditions.rows(EVALUATION, 1234, range(3))
    output = noise_prediction(task.denoiser())(torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), **rows)
    assert output.shape == (3, 8 if name == "cifar10_dit_tiny" else 4, 8, 8)
    assert {key: tensor.shape[1:] for key, tensor in rows.items()} == {
        key: tensor.shape[1:] for key, tensor in conditions.null.items()
    }
    images = task.to_images()(torch.randn(3, 4, 8, 8))
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 32, 32)


@pytest.mark.parametrize("name", TASKS)
def test_the_hash_follows_the_model_and_the_autoencoder_and_not_the_card(name: str, places, tmp_path: Path) -> None:
    import shutil

    folders, autoencoder = places
    folder, vae = shutil.copytree(folders[name], tmp_path / "model"), shutil.copytree(autoencoder, tmp_path / "vae")
    words = (f"model.path={folder}", f"model.first_stage={vae}")
    found = [task_of(name, *words).sha256()]
    (folder / "training.json").write_text("{}")
    assert task_of(name, *words).sha256() == found[0]
    for place in (next(folder.glob("*/config.json")), vae / "config.json"):
        place.write_text(place.read_text() + " ")
        found.append(task_of(name, *words).sha256())
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", TASKS)
def test_a_model_may_bring_its_own_autoencoder(name: str, places, tmp_path: Path) -> None:
    import shutil

    folders, autoencoder = places
    folder = shutil.copytree(folders[name], tmp_path / "model")
    shutil.copytree(autoencoder, folder / "vae")
    task = task_of(name, f"model.path={folder}")
    assert task.others == () and task.to_images()(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 32, 32)


@pytest.fixture
def without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_latent, "ASSETS", tmp_path)
    monkeypatch.setattr(cifar10_latent, "AUTOENCODER", tmp_path / "cifar10_autoencoder" / "vae")
    monkeypatch.setattr("edadm.metrics.clip_tiny.FOLDER", tmp_path / "cifar10_clip_tiny")


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize("name", TASKS)
def test_weights_that_are_not_there_say_how_to_train_them(name: str) -> None:
    training = f"experiments.train_tiny {name.split('_')[1]} --export edadm/assets/{name}"
    with pytest.raises(EdadmError, match=rf"{name} does not exist: train it with .*{training}"):
        task_of(name).sha256()
    chosen = config.settings(config.compose([f"task={name}", "device=cpu"]), [f"task={name}", "device=cpu"])
    report, complete = requirements.report(chosen)
    assert not complete and training in report
    wanted = ["weights", "part", *(["clip_tiny"] if name == "cifar10_t2i_tiny" else [])]
    assert f"Missing: {', '.join(wanted)}" in report
    if name == "cifar10_t2i_tiny":
        assert "prompts      here: 200 to evaluate, 100 others to calibrate" in report


@pytest.mark.usefixtures("without_weights")
def test_an_autoencoder_that_is_not_there_is_named(places) -> None:
    with pytest.raises(EdadmError, match=r"needs .*cifar10_autoencoder/vae, which does not exist: train it with"):
        task_of("cifar10_ldm_tiny", f"model.path={places[0]['cifar10_ldm_tiny']}").sha256()


def test_prompts_name_their_class_and_none_calibrates_and_is_evaluated() -> None:
    evaluated, calibration = text.split_prompts(str(PROMPTS / "evaluation.txt"), str(PROMPTS / "calibration.txt"))
    assert (len(evaluated), len(calibration)) == (200, 100) and not set(evaluated) & set(calibration)
    assert len(read_captions(PROMPTS / "calibration.txt")) == 100
    for prompts in (evaluated, calibration):
        for number, prompt in enumerate(prompts):
            assert [name for name in CLASSES if name in prompt.split()] == [CLASSES[number % 10]], prompt
    task = task_of("cifar10_t2i_tiny")
    assert task.conditions().prompts(EVALUATION, 1234, [0, 13, 200]) == [
        "a photo of an airplane", "a picture of a cat", "a photo of an airplane",
    ]  # fmt: skip
    assert set(task.conditions().prompts(CALIBRATION, 0, range(100))) == set(calibration)


def test_prompts_of_ones_own_bring_their_own_calibration(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a photo of a cat {n}" for n in range(20)))
    found = task_of("cifar10_t2i_tiny", f"dataset.prompts={tmp_path / 'prompts.txt'}").conditions()
    assert (len(found.evaluated), len(found.calibration)) == (18, 2)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("cifar10_ldm_tiny", ("scaled_linear", LDM_PARAMS.linear_start, LDM_PARAMS.linear_end)),
        ("cifar10_t2i_tiny", ("scaled_linear", T2I_PARAMS.linear_start, T2I_PARAMS.linear_end)),
        ("cifar10_dit_tiny", ("linear", 1e-4, 0.02)),
    ],
)
def test_a_task_has_the_noise_schedule_of_the_model_it_stands_for(name: str, schedule: tuple) -> None:
    sampler = config.compose([f"task={name}"]).sampler
    assert (sampler.beta_schedule, sampler.beta_start, sampler.beta_end) == schedule
    real = {"ldm": "imagenet_ldm4", "t2i": "coco_sd14", "dit": "imagenet_dit"}[name.split("_")[1]]
    theirs = config.compose([f"task={real}"]).sampler
    assert (theirs.beta_schedule, theirs.beta_start, theirs.beta_end) == schedule


def test_the_middle_of_the_transformer_is_its_middle_block() -> None:
    features = config.compose(["task=cifar10_dit_tiny"]).model.features
    middle = DIT_PARAMS.depth // 2
    assert features.middle_attention_input == f"transformer_blocks.{middle - 1}"
    assert features.middle_output == f"transformer_blocks.{middle}"


@pytest.mark.parametrize("name", TASKS)
def test_the_configured_cost_is_that_of_the_model(name: str) -> None:
    from diffusers import DiTTransformer2DModel

    from edadm import cost

    params = {"cifar10_ldm_tiny": LDM_PARAMS, "cifar10_t2i_tiny": T2I_PARAMS}.get(name)
    config_of = dit_config(DIT_PARAMS) if params is None else unet_config(params.unet)
    model = empty_model(*config_of).to_empty(device="cpu").eval()
    condition = {"encoder_hidden_states": torch.zeros(1, 16 if name == "cifar10_t2i_tiny" else 1, 64)}
    if isinstance(model, DiTTransformer2DModel):
        condition = {"class_labels": torch.tensor([0])}
    with torch.no_grad():
        layers = cost.measure(model, torch.zeros(1, 4, 8, 8), timestep=torch.tensor([3]), **condition)
    macs = sum(layer.macs for layer in layers)
    assert config.compose([f"task={name}"]).model.macs == pytest.approx(macs, rel=0.01)
