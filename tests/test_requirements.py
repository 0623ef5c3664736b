from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from edadm import config, requirements
from edadm.cost import output_numbers
from edadm.keys import Run
from edadm.metric_needs import FETCHED, MISSING
from edadm.requirements import FEATURE_NUMBERS
from edadm.tasks import weights
from edadm.tasks.cifar10_latent import DIT_PARAMS, LDM_PARAMS, T2I_PARAMS
from edadm.tasks.cifar10_tiny import ASSETS
from edadm.tasks.compvis_unet import unet_config
from edadm.tasks.ddim_checkpoint import CIFAR10
from edadm.tasks.dit_checkpoint import DIT_XL_2_256, dit_config
from edadm.tasks.ldm_checkpoint import LDM_MODELS
from edadm.tasks.model_folder import empty_model
from tests.tasks import originals
from tests.tasks.narrow import ldm_folder


def settings(*words: str) -> config.Settings:
    return config.settings(config.compose(words), words)


def run_of(*words: str) -> Run:
    chosen = settings("device=cpu", *words)
    return Run(chosen, requirements.task_without_download(chosen), requirements.Store(), "cpu", 1)


def test_a_task_without_anything_says_what_to_get_and_what_to_expect() -> None:
    text, complete = requirements.report(settings("task=imagenet_ldm4", "device=cpu"))
    assert not complete and "Missing: weights, reference" in text
    assert "cin256-v2" in text and "11.69 expected; below 11.09 or above 12.29 stop" in text
    for stage in ("trajectories", "quantized", "images"):
        assert stage in text
    assert "\n  decoding and metrics come on top\n" in text


def test_a_text_to_image_task_asks_for_prompts(tmp_path: Path) -> None:
    words = ["task=coco_sd14", "device=cpu"]
    text = requirements.report(settings(*words))[0]
    assert "prompts      MISSING: dataset.prompts is not set" in text and "captions_val2014.json" in text
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red cube {i}" for i in range(20)))
    text, _ = requirements.report(settings(*words, f"dataset.prompts={tmp_path / 'prompts.txt'}"))
    assert "18 to evaluate, 2 others to calibrate" in text


@pytest.mark.parametrize(
    ("task", "source"),
    [
        ("imagenet_ldm4", "VIRTUAL_imagenet256_labeled.npz of ADM's"),
        ("lsun_bedroom_ldm4", "VIRTUAL_lsun_bedroom256.npz of ADM's"),
        ("lsun_church_ldm8", "church_outdoor of LSUN"),
        ("coco_sd14", "val2014 of MS-COCO"),
    ],
)
def test_a_task_says_where_its_reference_and_prompts_are(task: str, source: str) -> None:
    needs = list(requirements.needs_of(run_of(f"task={task}")))
    (reference,) = (need for need in needs if need.what == "reference")
    assert reference.state == MISSING and source in reference.remedy
    for need in needs:
        assert need.what != "prompts" or "annotations of 2014, cocodataset.org" in need.found


def missing(*words: str) -> list[str]:
    """Return the lines of what is missing of a run."""
    return [need.line for need in requirements.needs_of(run_of(*words)) if need.state == MISSING]


def test_what_fd_dinov2_compares_with_and_its_weights_are_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "metrics.dinov2.reference is not set" in "".join(missing("metrics=dinov2"))
    words = ["metrics=dinov2", "metrics.dinov2.reference=cifar10-train"]
    needs = {need.what: need for need in requirements.needs_of(run_of(*words))}
    assert needs["DINOv2"].state == FETCHED and "dinov2_vitl14_pretrain.pth" in needs["DINOv2"].found
    (line,) = missing(*words, "metrics.dinov2.weights=/nowhere.pth")
    assert "DINOv2       MISSING: /nowhere.pth does not exist" in line


def test_prompts_of_scored_images_are_a_need_of_a_task_without_any(tmp_path: Path) -> None:
    (line,) = missing("metrics=clip", "n_images=3")
    assert "prompts      MISSING: the scored images have none" in line and "metrics.clip.prompts" in line
    (tmp_path / "prompts.txt").write_text("a cat\na dog")
    (line,) = missing("metrics=clip", "n_images=3", f"metrics.clip.prompts={tmp_path / 'prompts.txt'}")
    assert "2 prompts for 3 images" in line
    assert not missing("metrics=clip", "n_images=2", f"metrics.clip.prompts={tmp_path / 'prompts.txt'}")


def test_files_of_metrics_that_are_not_there_are_missing() -> None:
    (line,) = missing("metrics.reference=/nowhere.safetensors")
    assert "statistics   MISSING: /nowhere.safetensors does not exist; set metrics.reference" in line
    (line,) = missing("metrics=aesthetic", "metrics.aesthetic.head=/nowhere.safetensors")
    assert "head         MISSING: /nowhere.safetensors does not exist; set metrics.aesthetic.head to v1, v2" in line
    assert not missing("metrics=aesthetic", "metrics.aesthetic.head=v2")


def test_drawbench_is_evaluated_on_all_of_its_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red cube {i}" for i in range(20)))
    (tmp_path / "captions.txt").write_text("a cat\na dog")
    assert "the prompts of DrawBench" in requirements.report(settings("task=drawbench_sd14", "device=cpu"))[0]
    words = ["task=drawbench_sd14", "device=cpu", f"dataset.prompts={tmp_path / 'prompts.txt'}"]
    text, _ = requirements.report(settings(*words))
    assert "prompts      MISSING: task drawbench_sd14 evaluates every prompt" in text and "captions_val2014" in text
    text, _ = requirements.report(settings(*words, f"dataset.calibration_prompts={tmp_path / 'captions.txt'}"))
    assert "20 to evaluate, 2 others to calibrate" in text
    text, _ = requirements.report(settings(*words, "task.calibration_conditions=released"))
    assert "20 to evaluate, 0 others to calibrate" in text


def test_what_is_there_is_found(tmp_path: Path) -> None:
    model = ldm_folder("imagenet_ldm4", tmp_path / "model")
    words = [
        "task=imagenet_ldm4", f"model.path={model}", f"metrics.inception.reference={tmp_path / 'real.npz'}", "device=cpu",
        "n_images=10",
    ]  # fmt: skip
    (tmp_path / "real.npz").touch()
    text, complete = requirements.report(settings(*words))
    assert complete and "Nothing is missing." in text


def test_a_path_of_a_task_that_fetches_nothing_is_no_name_on_the_hub() -> None:
    text, complete = requirements.report(settings("task=imagenet_ldm4", "model.path=checkpoints/model", "device=cpu"))
    assert "weights      MISSING: model.path=checkpoints/model does not exist; set model.path" in text
    assert not complete


def test_a_file_of_weights_that_is_not_there_is_no_name_on_the_hub() -> None:
    text, _ = requirements.report(settings("task=coco_sd14", "model.path=checkpoints/sd-v1-4.ckpt", "device=cpu"))
    assert "weights      MISSING: model.path=checkpoints/sd-v1-4.ckpt does not exist" in text
    assert weights.is_hub_name("owner/name.v2") and not weights.is_hub_name("./name")


@pytest.mark.parametrize("task", ["cifar10_ldm_tiny", "cifar10_dit_tiny"])
def test_other_parts_of_an_embedded_task_are_folders_here(task: str) -> None:
    words = [f"task={task}", "device=cpu"]
    text, complete = requirements.report(settings(*words, "model.first_stage=owner/name"))
    assert f"part         MISSING: {Path('owner/name').absolute()} does not exist" in text and not complete
    text, complete = requirements.report(settings(*words, "model.path=owner/name"))
    assert "weights      MISSING: model.path=owner/name does not exist" in text and not complete


def test_the_embedded_task_has_everything() -> None:
    text, complete = requirements.report(settings("device=cpu"))
    assert complete and "images       about" in text


def test_a_hub_name_is_looked_up_and_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    chosen = settings("task=imagenet_dit", "model.path=facebook/DiT-XL-2-256", "device=cpu")
    text, _ = requirements.report(chosen)
    assert f"weights      {FETCHED}: facebook/DiT-XL-2-256" in text and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "word", ["sampler=ddim_uniform", "sampler.steps=10", "sampler.guidance_scale=1.5", "n_images=10"]
)
def test_scores_of_other_images_are_not_expected(word: str) -> None:
    words = ["task=imagenet_ldm4", "device=cpu"]
    assert "11.69 expected" in requirements.report(settings(*words))[0]
    text, _ = requirements.report(settings(*words, word))
    assert "expected;" not in text and "is of profile=paper" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["metrics.clip.model=ViT-L-14", "metrics.clip.pretrained=openai"], {"fid", "sfid"}),
        (["metrics.clip.prompts=/prompts.txt"], {"fid", "sfid"}),
        (["metrics.inception.sha256=0"], {"clip"}),
        (["metrics.crop=center_256"], set()),
        (["model.sample_shape=[4,32,32]"], set()),
        (["profile.images=10"], set()),
        (
            ["model.path=/weights", "dataset.prompts=/captions.json", "metrics.inception.reference=/val2014",
             "metrics.clip.weights=/clip.safetensors"],
            {"fid", "sfid", "clip"},
        ),
    ],
)  # fmt: skip
def test_scores_that_are_measured_otherwise_are_not_expected(words: list[str], expected: set[str]) -> None:
    assert run_of("task=coco_sd14", *words).expected_band.keys() == expected


def test_other_references_than_those_of_the_task_have_no_expected_score() -> None:
    assert run_of("task=cifar10_ddim").expected_band.keys() == {"fid", "is"}
    assert not run_of("task=cifar10_ddim", "metrics.inception.reference=/images").expected_band
    assert run_of().expected_band.keys() == {"fd_tiny"}
    assert not run_of("metrics.reference=/statistics.safetensors").expected_band


def test_an_original_dit_is_missing_its_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    torch.save(originals.dit_state(), tmp_path / "DiT.pt")
    words = ["task=imagenet_dit", f"model.path={tmp_path / 'DiT.pt'}", "device=cpu"]
    text, _ = requirements.report(settings(*words))
    assert "part         MISSING" in text and "set model.first_stage" in text
    text, _ = requirements.report(settings(*words, "model.first_stage=stabilityai/sd-vae-ft-ema"))
    assert f"part         {FETCHED}: stabilityai" in text
    text, _ = requirements.report(settings(*words, f"model.first_stage={tmp_path}"))
    assert f"part         here: {tmp_path}" in text


def test_a_truncated_checkpoint_is_missing(tmp_path: Path) -> None:
    torch.save(originals.ldm_state(), tmp_path / "model.ckpt")
    words = ["task=imagenet_ldm4", f"model.path={tmp_path / 'model.ckpt'}", "device=cpu"]
    assert "weights      here" in requirements.report(settings(*words))[0]
    (tmp_path / "model.ckpt").write_bytes((tmp_path / "model.ckpt").read_bytes()[:5000])
    text, complete = requirements.report(settings(*words))
    assert "weights      MISSING: cannot read" in text and "truncated" in text and not complete


def test_disk_grows_with_images_and_rows() -> None:
    def needed(*words: str) -> float:
        return requirements.disk_bytes(run_of("task=lsun_church_ldm8", *words))

    more_images = needed("n_images=1000") - needed("n_images=0")
    assert more_images == 3 * 1000 * 3 * 256 * 256  # a church latent of 32 x 32 decodes to 256 x 256
    assert needed("n_images=0") > 4 * 1024 * 500 * 4 * 32 * 32


# 1024 trajectories of DiT: 250 steps of 4 x 32 x 32 latents; 64 of them, twice, with 256 tokens of 1152
DIT_INPUTS, DIT_FEATURES = 4 * 250 * 1024 * 4 * 32 * 32, 4 * 250 * 2 * 64 * 256 * 1152


def test_trajectories_and_their_features_are_counted() -> None:
    assert (DIT_INPUTS, DIT_FEATURES) == (4_194_304_000, 37_748_736_000)
    run = run_of("task=imagenet_dit", "n_images=0")
    assert requirements.trajectory_bytes(run) == (DIT_INPUTS, DIT_FEATURES)
    rows = 4 * 1024 * 4 * 32 * 32
    assert requirements.disk_bytes(run) == DIT_INPUTS + DIT_FEATURES + rows + 4 * 749.8e6
    bedroom = run_of("task=lsun_bedroom_ldm4")  # 200 steps of 3 x 64 x 64; features of 896 x 8 x 8, no guidance
    n, chunk = (bedroom.settings[name] for name in ("profile.rows", "chunk"))
    assert requirements.trajectory_bytes(bedroom) == (4 * 200 * n * 3 * 64 * 64, 4 * 200 * chunk * 896 * 8 * 8)


def test_host_memory_for_trajectories_is_said_where_they_are_collected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = {"device": 24e9, "host": 24e9, "disk": 1e12}
    monkeypatch.setattr("edadm.memory.free_bytes", lambda run: free)
    words = ["task=imagenet_dit", "device=cpu"]
    text, complete = requirements.report(settings(*words))
    said = "24 GB free, about 41.9 GB needed for trajectories, 37.7 of it features; choose fewer rows (profile.rows)"
    assert f"host memory  MISSING: {said}" in text and not complete
    free["host"] = 64e9
    assert "host memory  here: 64 GB free, about 41.9 GB" in requirements.report(settings(*words))[0]
    (tmp_path / "rows.safetensors").touch()
    for word in ("method=fp", f"calibration_set={tmp_path / 'rows.safetensors'}"):
        assert "host memory" not in requirements.report(settings(*words, word))[0]
        assert requirements.disk_bytes(run_of(words[0], word, "n_images=0")) < DIT_INPUTS


MODELS = {
    "cifar10_tiny": ("UNet2DModel", json.loads((ASSETS / "cifar10_tiny" / "config.json").read_text())),
    "cifar10_ldm_tiny": unet_config(LDM_PARAMS.unet),
    "cifar10_dit_tiny": dit_config(DIT_PARAMS),
    "cifar10_t2i_tiny": unet_config(T2I_PARAMS.unet),
    "ddim_cifar10": ("UNet2DModel", CIFAR10),
    "ldm4_bedroom": unet_config(LDM_MODELS["lsun_bedroom_ldm4"].unet),
    "ldm4_imagenet": unet_config(LDM_MODELS["imagenet_ldm4"].unet),
    "ldm8_church": unet_config(LDM_MODELS["lsun_church_ldm8"].unet),
    "sd14": unet_config(LDM_MODELS["sd14"].unet),
    "dit_xl_2": dit_config(DIT_XL_2_256),
}


@pytest.mark.parametrize("name", FEATURE_NUMBERS)
def test_features_are_as_large_as_those_of_the_networks(name: str) -> None:
    kind, values = MODELS[name]
    model, size = empty_model(kind, values).eval().to("meta"), values["sample_size"]
    given: dict[str, torch.Tensor] = {}
    with torch.device("meta"):
        if kind == "UNet2DConditionModel":
            given["encoder_hidden_states"] = torch.zeros(1, 2, values["cross_attention_dim"])
        if kind == "DiTTransformer2DModel":
            given["class_labels"] = torch.zeros(1, dtype=torch.int64)
        x, t = torch.zeros(1, values["in_channels"], size, size), torch.zeros(1, dtype=torch.int64)
        for feature in OmegaConf.load(config.CONF / "model" / f"{name}.yaml").features.values():
            module = model.get_submodule(feature)
            found = output_numbers(module, lambda: model(x, timestep=t, **given))
            assert found == FEATURE_NUMBERS[name] * size * size
