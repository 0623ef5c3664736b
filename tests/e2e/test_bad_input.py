"""What users give by mistake: a message that says what, why and what to do, exit code 2, and nothing computed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edadm import cli, config, estimate, experiment
from edadm.calibration.rows import CalibrationSet
from edadm.metrics.images import write_folder
from tests.metrics.conftest import random_images
from tests.tasks import originals
from tests.tasks.narrow import dit_folder, ldm_folder, pipeline_folder
from tests.toys import tiny_unet

Refused = Callable[..., None]
SMALL = (
    "method=rtn", "bits=w4a8", "profile.steps=4", "profile.images=3", "profile.rows=4", "profile.batch=2",
    "profile.range_batches=2", "chunk=2", "metrics.names=[sqnr,psnr]", "metrics.sqnr_rows=2", "metrics.bootstrap=10",
    "threads=1", "device=cpu", "precision=fp32", "reference=null",
)  # fmt: skip
DIT = ("task=imagenet_dit", "model.sample_shape=[4,8,8]", "model.features.middle_attention_input=transformer_blocks.0")
SD = ("task=coco_sd14", "model.sample_shape=[4,8,8]")
PROMPTS = [f"a {letter} b" for letter in "abcdefghijklmnopq"]


def line(results: Path, *more: str) -> list[str]:
    given = {word.split("=")[0] for word in more}
    return [f"results={results}", *(word for word in SMALL if word.split("=")[0] not in given), *more]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def refused(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run words of the command line as a job that is refused before any stage, with a message."""

    def run(*more: str, says: str) -> None:
        words = line(tmp_path / "results", *more)
        before = sorted(cache.glob("*/*/manifest.json"))
        outcome, code = cli._guarded(config.compose(words), words, None)
        message = capsys.readouterr().err
        assert code == cli.REFUSED and outcome.status == "failed" and "Traceback" not in message, message
        assert re.search(says, message), message
        assert sorted(cache.glob("*/*/manifest.json")) == before, "a stage was computed"

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of every kind: folders unet, bedroom, imagenet and dit, files ldm.ckpt and dit.pt."""
    folder = tmp_path_factory.mktemp("weights")
    tiny_unet().save_pretrained(folder / "unet")
    ldm_folder("lsun_bedroom_ldm4", folder / "bedroom")
    ldm_folder("imagenet_ldm4", folder / "imagenet")
    dit_folder(folder / "dit")
    torch.save(originals.ldm_state(), folder / "ldm.ckpt")
    torch.save(originals.dit_state(), folder / "dit.pt")
    return folder


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return pipeline_folder(tmp_path_factory.mktemp("stable_diffusion") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return f"dataset.prompts={tmp_path / 'prompts.txt'}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


ANOTHER = {
    "file of latent diffusion": (
        ("task=cifar10_ddim", "model.path={}/ldm.ckpt"), r"ldm\.ckpt is a CompVis latent diffusion .*not .*DDIM .*choose",
    ),
    "file of DiT": (
        ("task=imagenet_ldm4", "model.path={}/dit.pt", "model.sample_shape=[3,8,8]"), r"dit\.pt is an original DiT .*give",
    ),
    "folder of DiT": (
        ("task=cifar10_tiny", "model.path={}/dit/transformer"), "holds a DiTTransformer2DModel: model.path must be",
    ),
    "folder of a UNet": ((*DIT, "+task.classes=5", "model.path={}/unet"), "holds a UNet2DModel, not a DiTTransformer2D"),
    "pipeline's folder": (("task=cifar10_tiny", "model.path={}/dit"), r"dit holds transformer, vae, each in a folder"),
    "conditional": (
        ("task=lsun_bedroom_ldm4", "model.path={}/imagenet", "model.sample_shape=[3,8,8]"),
        r"imagenet holds a conditional UNet2DConditionModel, this task is unconditional: .*choose the task",
    ),
    "unconditional": (
        ("task=imagenet_ldm4", "model.path={}/bedroom", "model.sample_shape=[3,8,8]"), "bedroom is an unconditional model",
    ),
    "channels": (
        ("task=lsun_church_ldm8", "model.path={}/bedroom", "model.sample_shape=[4,16,16]"),
        r"bedroom holds a UNet2DModel from 3 to 3 channels, model\.sample_shape=\[4, 16, 16\] needs 4 to 4: give",
    ),
    "size of a transformer": (
        ("task=imagenet_dit", "+task.classes=5", "model.path={}/dit", "model.sample_shape=[4,16,16]"),
        r"for samples of 8 x 8, its positions fit no others: model\.sample_shape is \[4, 16, 16\]",
    ),
    "labels out of range": (
        (*DIT, "+task.classes=9", "model.path={}/dit"), r"holds a DiT of 5 classes, not of 9: set \+task\.classes=5",
    ),
    "null label of a class": (
        (*DIT, "+task.classes=3", "model.path={}/dit"), r"holds a DiT of 5 classes, not of 3: set \+task\.classes=5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ANOTHER)
def test_weights_of_another_model(refused: Refused, weights: Path, what: str) -> None:
    words, message = ANOTHER[what]
    refused(*(word.format(weights) for word in words), says=message)


def test_weights_that_are_not_there(refused: Refused) -> None:
    refused("task=cifar10_ddim", "model.path=/nowhere", says=r"/nowhere does not exist: set model\.path to the EMA")
    refused("task=imagenet_ldm4", says=r"imagenet_ldm4 needs weights: set model\.path to the checkpoint")


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_truncated_download_of_a_folder(refused: Refused, weights: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(weights / "dit", tmp_path / "dit")
    cut(folder / part / "diffusion_pytorch_model.safetensors")
    says = rf"cannot read .*{part}.*safetensors \(.* MB\): .*truncated .*compare its size .*download it again"
    refused(*DIT, "+task.classes=5", f"model.path={folder}", says=says)


def test_a_truncated_download_of_a_file(refused: Refused, weights: Path, tmp_path: Path) -> None:
    file = shutil.copy(weights / "ldm.ckpt", tmp_path)
    cut(Path(file))
    refused(
        "task=imagenet_ldm4", f"model.path={file}", says=r"ldm\.ckpt \(.* MB\): its end is missing.*download it again"
    )


def test_a_name_on_the_hub_without_network(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for task in (("task=cifar10_ddim",), (*SD, prompts), DIT):
        refused(*task, "model.path=nobody/nothing", says="not be fetched from the hub .*hf download nobody/nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [("vae", "has no vae"), ("text_encoder", "has no text_encoder: give .*whole"), ("tokenizer", "has no tokenizer")],
)
@pytest.mark.parametrize("guidance", [7.5, 1])
def test_a_folder_of_a_pipeline_is_missing(
    refused: Refused, stable_diffusion: Path, tmp_path: Path, prompts: str, name: str, message: str, guidance: float
) -> None:
    folder = shutil.copytree(stable_diffusion, tmp_path / "model")
    shutil.rmtree(folder / name)
    refused(*SD, prompts, f"model.path={folder}", f"sampler.guidance_scale={guidance}", says=message)


def _empty_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()


def _another_text_encoder(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    save_file({name.replace("mlp", "wi"): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def _more_tokens(folder: Path) -> None:
    file = folder / "tokenizer" / "vocab.json"
    file.write_text(file.read_text()[:-1] + ", " + ", ".join(f'"{n}": {40 + n}' for n in range(9)) + "}")


TEXTS = {
    "empty tokenizer": (_empty_tokenizer, r"tokenizer has no vocabulary \(tokenizer\.json, or vocab\.json and .*fetch"),
    "vocabulary cut short": (lambda folder: cut(folder / "tokenizer" / "vocab.json"), r"cannot be read \(.*fetch"),
    "encoder cut short": (
        lambda folder: cut(folder / "text_encoder" / "model.safetensors"),
        "model.safetensors.*truncat",
    ),
    "another encoder": (_another_text_encoder, "text_encoder does not fit CLIPTextModel: missing .*mlp"),
    "another vocabulary": (_more_tokens, r"tokenizer in .* has 45 tokens, its text encoder 40: they are of different"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_text_encoder_that_cannot_be_right(
    refused: Refused, stable_diffusion: Path, tmp_path: Path, prompts: str, what: str
) -> None:
    folder = shutil.copytree(stable_diffusion, tmp_path / "model")
    change, message = TEXTS[what]
    change(folder)
    refused(*SD, prompts, f"model.path={folder}", says=message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts: write one a line"),
        (b"a cat\ncaf\xe9\n", r"not UTF-8 \(byte 9 is 0xe9\): save it as UTF-8"),
        (b"a cat\n", "one prompt, which cannot calibrate and be evaluated: give more"),
        (b"a\n\nb\n", "line 2 of .* is empty"),
    ],
)
def test_prompts_that_cannot_be_used(
    refused: Refused, stable_diffusion: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    words = (*SD, f"model.path={stable_diffusion}")
    refused(*words, f"dataset.prompts={tmp_path / 'mine.txt'}", says=message)
    refused(*words, says=r"dataset\.prompts is not set, and task coco_sd14 has none of its own")
    refused(*words, "dataset.prompts=/nowhere.txt", says="cannot read prompts from /nowhere.txt: No such file")


def test_fewer_prompts_than_images_are_said(stable_diffusion: Path, tmp_path: Path, prompts: str) -> None:
    words = line(tmp_path / "results", *SD, f"model.path={stable_diffusion}", prompts, "n_images=20")
    run = experiment.prepare(config.settings(config.compose(words), words))
    assert "20 images of 16 prompts, each used several times" in estimate.announcement(run, None)
    words[-1] = "n_images=16"
    run = experiment.prepare(config.settings(config.compose(words), words))
    assert "4 rows, 16 images, 5 steps" in estimate.announcement(run, None)


TINY = "task=cifar10_tiny"
SAMPLING = {
    "guidance of an unconditional model": (
        (TINY, "sampler.guidance_scale=3"), r"guidance_scale=3, but the model .* unconditional: .* set it to 1",
    ),
    "a flow's sampler": ((TINY, "sampler=flow_euler"), "FlowEuler steps with flow_prediction, .* epsilon: choose"),
    "a sampler with variance": ((TINY, "sampler=ddpm_respaced"), "needs the variance .*choose a DDIM sampler"),
    "of the calibration": (
        (TINY, "sampler@calibration_sampler=ddpm_respaced"), "needs the variance .*choose a DDIM sampler",
    ),
    "a pipeline's sampler": ((TINY, "sampler=own"), "sampler=own is that of a user's pipeline"),
    "too many steps": ((TINY, "sampler.steps=2000"), "2000 steps: choose 1 to 1000"),
    "eta": ((TINY, "sampler.eta=3"), "eta is 3: choose 0"),
    "a word": ((TINY, "sampler.eta=much"), r"sampler\.eta=much: give a number"),
    "a word for guidance": ((TINY, "sampler.guidance_scale=three"), r"guidance_scale=three: give a number"),
    "eta of a sampler without": (
        (TINY, "sampler=plms", "+sampler.eta=1"), "plms has no eta: what can be set is .*spacing, steps",
    ),
    "two numbers for a shape": ((*DIT[:1], "model.sample_shape=[4,8]"), "give channels, height and width"),
}  # fmt: skip


@pytest.mark.parametrize("what", SAMPLING)
def test_a_sampler_that_does_not_fit(refused: Refused, what: str) -> None:
    words, message = SAMPLING[what]
    refused(*words, says=message)


@pytest.fixture
def inception(weights: Path, tmp_path: Path) -> tuple[str, ...]:
    """Words that score the small network of 32 x 32 images by FID, its weights named but never read."""
    torch.save({"a": torch.zeros(1)}, tmp_path / "inception.pt")
    sha256 = hashlib.sha256((tmp_path / "inception.pt").read_bytes()).hexdigest()
    named = (f"metrics.inception.weights={tmp_path / 'inception.pt'}", f"metrics.inception.sha256={sha256}")
    return (TINY, f"model.path={weights / 'unet'}", "metrics=inception", "metrics.names=[fid]", *named)


def test_a_reference_folder_that_cannot_be_compared_with(
    refused: Refused, inception: tuple[str, ...], tmp_path: Path
) -> None:
    def reference(name: str, *sizes: int) -> str:
        (tmp_path / name).mkdir()
        for start, size in enumerate(sizes):
            write_folder(random_images(1, size), tmp_path / name, start)
        return f"metrics.inception.reference={tmp_path / name}"

    refused(*inception, reference("empty"), says="no images in .*empty: expected files ending")
    refused(*inception, reference("one", 32), says="one has 1 image: .*at least 2, better thousands")
    refused(*inception, reference("mixed", 32, 16), says=r"must have one size; metrics\.crop")
    says = r"images of reference .*small are 16 x 16, the scored ones 32 x 32: give .*metrics\.crop"
    refused(*inception, reference("small", 16, 16), says=says)
    refused(*inception, "metrics.inception.reference=/nowhere", says="no reference at /nowhere: give a folder")
    refused(*inception, "metrics.inception.reference=stl10-train", says="stl10-train are 96 x 96, the scored ones 32")


def test_a_reference_of_another_size_than_images_that_are_made(
    refused: Refused, inception: tuple[str, ...], tmp_path: Path
) -> None:
    write_folder(random_images(2, 16), tmp_path / "small")
    write_folder(random_images(2, 32), tmp_path / "made")
    words = line(tmp_path / "results", *inception, "metrics.inception.reference=null", "method=fp")
    unscored = [*words, "metrics.names=[psnr]"]
    experiment.execute(experiment.prepare(config.settings(config.compose(unscored), unscored)))
    other, says = f"metrics.inception.reference={tmp_path / 'small'}", "are 16 x 16, the scored ones 32 x 32: give"
    refused(*inception, other, says=says)
    refused(*inception, other, f"images={tmp_path / 'made'}", says=says)


def test_a_reference_file_that_cannot_be_compared_with(
    refused: Refused, inception: tuple[str, ...], tmp_path: Path
) -> None:
    np.savez(tmp_path / "nothing.npz", x=np.zeros(3))
    np.savez(tmp_path / "other.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:200])
    for name, says in {
        "nothing": "neither statistics .* nor images",
        "other": "statistics of 4 features, the images have 2048: another network",
        "images": "are 16 x 16, the scored ones 32 x 32",
        "cut": "cannot read reference statistics from",
    }.items():
        refused(*inception, f"metrics.inception.reference={tmp_path / name}.npz", says=says)


def test_embedded_proxies_of_other_images(refused: Refused, weights: Path, tmp_path: Path) -> None:
    words = ("task=cifar10_ddim", f"model.path={weights / 'unet'}", "metrics=tiny", "metrics.names=[fd_tiny]")
    refused(*words, "model.sample_shape=[3,8,8]", says="are 8 x 8, the embedded proxies take 32 x 32: choose other")
    (tmp_path / "reference.safetensors").write_bytes(b"nothing")
    broken = f"metrics.reference={tmp_path / 'reference.safetensors'}"
    refused(*words, broken, says="is no reference of the embedded proxies .*write it again")


@pytest.fixture
def rows() -> CalibrationSet:
    labels = {"class_labels": torch.tensor([0, 1, 4, 2])}
    return CalibrationSet(
        torch.randn(4, 4, 8, 8), torch.full((4,), 7), torch.zeros(4, dtype=torch.int64), labels,
        {"class_labels": torch.tensor([5])},
    )  # fmt: skip


def test_calibration_rows_of_another_task(
    refused: Refused, weights: Path, tmp_path: Path, rows: CalibrationSet
) -> None:
    words = (*DIT, "+task.classes=5", f"model.path={weights / 'dit'}", f"calibration_set={tmp_path / 'rows'}")

    def given(condition: dict | None, null: dict | None = None, size: int = 8) -> None:
        x = rows.x[..., :size, :size]
        CalibrationSet(x, rows.timestep, rows.step, condition, null).save(tmp_path / "rows", {})

    given(None)
    refused(*words, says="holds rows with the condition none, task imagenet_dit takes class_labels: use a set made")
    given({"encoder_hidden_states": torch.zeros(4, 3, 8)})
    refused(*words, says=r"condition encoder_hidden_states \[3, 8\], task imagenet_dit takes class_labels")
    given({"class_labels": rows.condition["class_labels"] + 2}, rows.null)
    refused(*words, says="class labels from 2 to 6, the labels of task imagenet_dit are 0 to 5")
    given(dict(rows.condition), dict(rows.null), size=4)
    refused(*words, says=r"rows of shape \(4, 4, 4\), the network expects \(4, 8, 8\)")
    refused(*words, "profile.rows=5", says="expects|holds 4 rows, 5 are needed")


def test_a_quantized_model_of_another_task_or_cut_short(
    refused: Refused, weights: Path, tmp_path: Path, cache: Path
) -> None:
    words = line(tmp_path / "results", TINY, f"model.path={weights / 'unet'}", "n_images=0", "metrics.names=[sqnr]")
    assert cli._guarded(config.compose(words), words, None)[1] == cli.OK
    folder = shutil.copytree(next(cache.glob("quantized/*/quantized.json")).parent, tmp_path / "quantized")
    another = (*DIT, "+task.classes=5", f"model.path={weights / 'dit'}")
    refused(*another, f"load={folder}", says="quantized model of task cifar10_tiny, this is .*choose task=cifar10_tiny")
    cut(folder / "quantized.safetensors")
    mine = (TINY, f"model.path={weights / 'unet'}", f"load={folder}")
    refused(*mine, says=r"cannot read .*quantized\.safetensors .*truncated")
    refused(
        *mine[:2], f"load={weights / 'unet'}", says=r"no readable quantized\.json.*folder that save wrote|no readable"
    )
    refused(*mine[:2], "load=/nowhere", says="load=/nowhere does not exist")
