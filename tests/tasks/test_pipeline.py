"""A pipeline's folder as a task: its samples are those of the pipeline itself, and what cannot be covered is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edadm import cost
from edadm.errors import EdadmError
from edadm.sampling.guidance import ClassConditions, Guidance, denoise_for
from edadm.sampling.interface import fitted
from edadm.sampling.noise import CALIBRATION, EVALUATION
from edadm.tasks.base import Task, noise_prediction
from edadm.tasks.pipeline import Given, pipeline
from edadm.tasks.pipeline_calls import CALLS, adapt
from edadm.tasks.pipeline_decoder import PipelineDecoder
from edadm.tasks.pipeline_live import live
from tests import small_pipelines
from tests.small_pipelines import PIPELINES, PROMPTS, TEXTS
from tests.toys import tiny_unet

pytest.importorskip("transformers")
NUMBERS, STEPS, SEED = (0, 1), 4, 5


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without the messages of diffusers and transformers about what is not installed."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small pipeline by its name, saved once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            PIPELINES[name](folders[name] / "vocabulary").save_pretrained(folders[name])
        return folders[name]

    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return str(file)


def task_of(saved: Callable[[str], Path], name: str, prompts: str, **given: Any) -> Task:
    given = {"sample_shape": (4, 8, 8), **given} if name == "flux" else given
    return pipeline(str(saved(name)), prompts=prompts if name in TEXTS else None, **given)


def guidance_of(task: Task) -> Guidance | None:
    if task.conditions is None:
        return None
    scale = 1.0 if task.own.embeds_guidance else task.own.guidance_scale
    return Guidance(task.conditions(), scale, task.guided_channels)


def call_of(name: str, guidance: Guidance | None) -> dict[str, Any]:
    """The arguments with which a pipeline makes the images of NUMBERS."""
    sizes = {"flux": {"height": 16, "width": 16}, "pixart": {"use_resolution_binning": False}}.get(name, {})
    if guidance is None:
        return {"batch_size": len(NUMBERS)}
    if name in TEXTS:
        return {"prompt": guidance.conditions.prompts(EVALUATION, SEED, NUMBERS), **sizes}
    return {"class_labels": guidance.conditions.labels(EVALUATION, SEED, NUMBERS).tolist()}


@pytest.mark.parametrize("name", PIPELINES)
def test_images_are_those_of_the_pipeline(name: str, saved: Callable[[str], Path], prompts: str) -> None:
    from diffusers import DiffusionPipeline

    task = task_of(saved, name, prompts)
    guidance, generator = guidance_of(task), torch.Generator().manual_seed(3)
    sampler = fitted(task.own.sampler(STEPS, 0.0), task.prediction_type, task.learned_variance)
    bound = denoise_for(noise_prediction(task.denoiser()), guidance, EVALUATION, SEED, NUMBERS)
    draw = lambda *_: torch.randn(len(NUMBERS), *task.sample_shape, generator=generator)
    images = task.to_images()(sampler.run(bound, draw(), draw))

    pipe = DiffusionPipeline.from_pretrained(saved(name))
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        **call_of(name, guidance),
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    expected = torch.from_numpy(made).permute(0, 3, 1, 2).mul(255)
    assert images.shape == expected.shape and expected.std() > 20
    assert (images - expected).abs().max() <= 1


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion_xl", "dit", "pixart", "stable_diffusion_3", "flux"])
def test_size_and_features_are_those_of_the_denoiser(name: str, saved: Callable[[str], Path], prompts: str) -> None:
    task = task_of(saved, name, prompts)
    denoiser = task.denoiser()
    condition = task.conditions().rows(EVALUATION, SEED, [0]) if task.conditions else {}
    parameters, macs = task.own.size()
    assert parameters == sum(tensor.numel() for tensor in denoiser.parameters())
    x = torch.zeros(1, *task.sample_shape)
    measured = cost.measure(denoiser, x, timestep=torch.zeros(1), **condition)
    attended = {"ddim", "dit"}  # others are estimated with as many tokens of text as real ones have
    assert macs == sum(layer.macs for layer in measured) if name in attended else macs > 0
    modules = dict(denoiser.named_modules())
    assert set(task.own.features) == {"middle_attention_input", "middle_output"}
    for module in task.own.features.values():
        numbers = cost.output_numbers(modules[module], lambda: denoiser(x, timestep=torch.zeros(1), **condition))
        assert task.own.feature_numbers(module) == numbers


def test_the_numbers_of_other_samplers_are_those_of_the_training(saved: Callable[[str], Path], prompts: str) -> None:
    beta = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "train_steps": 1000}
    assert task_of(saved, "stable_diffusion", prompts).own.schedule == beta
    assert task_of(saved, "ddpm", prompts).own.schedule["train_steps"] == 100
    assert task_of(saved, "stable_diffusion_3", prompts).own.schedule["shift"] == 3.0


def test_guidance_is_that_of_the_pipelines_call(saved: Callable[[str], Path], prompts: str) -> None:
    defaults = {"ddim": 1.0, "stable_diffusion": 7.5, "dit": 4.0, "pixart": 4.5, "stable_diffusion_3": 7.0, "flux": 3.5}
    assert {name: task_of(saved, name, prompts).own.guidance_scale for name in defaults} == defaults
    strong = task_of(saved, "flux", prompts, guidance_scale=2.0)
    assert strong.own.embeds_guidance
    row = strong.conditions().rows(EVALUATION, SEED, [0, 1])["guidance"]
    assert row.tolist() == [2.0, 2.0]
    assert strong.conditions().identity(EVALUATION) != task_of(saved, "flux", prompts).conditions().identity(EVALUATION)


def test_calibration_prompts_are_no_evaluated_ones(saved: Callable[[str], Path], prompts: str) -> None:
    conditions = task_of(saved, "stable_diffusion", prompts).conditions()
    calibrated, evaluated = (set(conditions.prompts(stream, 0, range(20))) for stream in (CALIBRATION, EVALUATION))
    assert calibrated and evaluated and not calibrated & evaluated
    released = task_of(saved, "stable_diffusion", prompts, calibration_conditions="released").conditions()
    assert set(released.prompts(CALIBRATION, 0, range(20))) == evaluated


def labelled() -> Any:
    """A pipeline whose network embeds four labels."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    config = {name: value for name, value in tiny_unet().config.items() if not name.startswith("_")}
    return DDIMPipeline(UNet2DModel(**config | {"num_class_embeds": 4}), DDIMScheduler())


def test_a_class_conditional_unet_has_the_labels_it_embeds(tmp_path: Path) -> None:
    labelled().save_pretrained(tmp_path)
    task = pipeline(str(tmp_path))
    conditions = task.conditions()
    assert isinstance(conditions, ClassConditions) and (conditions.classes, conditions.null) == (4, None)
    with pytest.raises(EdadmError, match="without a null condition"):
        Guidance(conditions, 2.0)
    guided = pipeline(str(tmp_path), classes=3, null_label=3)
    found = guided.conditions().rows(EVALUATION, 0, range(6))["class_labels"]
    assert sorted(found.tolist()) == [0, 0, 1, 1, 2, 2] and guided.conditions().null["class_labels"].tolist() == [3]
    assert guided.denoiser()(torch.zeros(6, 3, 8, 8), torch.zeros(6), class_labels=found)[0].shape == (6, 3, 8, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": 0}, r"model\.classes=0: .* choose 1 to 4"),
        ({"classes": 9}, r"model\.classes=9: .* choose 1 to 4"),
        ({"classes": 2.5}, r"model\.classes=2\.5"),
        ({"null_label": -1}, r"model\.null_label=-1: .* choose 0 to 3"),
        ({"null_label": 4}, r"model\.null_label=4"),
    ],
)
def test_labels_are_those_of_the_table(given: dict[str, Any], message: str) -> None:
    with pytest.raises(EdadmError, match=message):
        live(labelled(), Given(**given))


def test_labels_of_a_pipeline_without_them_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    dit = live(PIPELINES["dit"](tmp_path), Given(classes=1000, null_label=1000)).conditions()
    assert (dit.classes, dit.null_label) == (1000, 1000)
    with pytest.raises(EdadmError, match="choose 1 to 1000"):
        live(PIPELINES["dit"](tmp_path), Given(classes=1001))
    for name in ("ddim", "stable_diffusion", "flux"):
        with pytest.raises(EdadmError, match=r"takes no class labels: leave model\.classes"):
            live(PIPELINES[name](tmp_path), Given(classes=10, prompts=lambda: ((), PROMPTS)))
    folder = copy_of(saved("stable_diffusion"), tmp_path / "pipeline")
    changed(folder, "unet/config.json", num_class_embeds=4)
    with pytest.raises(EdadmError, match=r"labels besides texts .*num_class_embeds=4"):
        pipeline(str(folder))


def test_a_pipeline_of_one_folder_is_read(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Early repositories on the hub have the files of their only network beside model_index.json."""
    for file in saved("ddim").rglob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert pipeline(str(tmp_path)).hashed == ()
    mine, whole = pipeline(str(tmp_path)).denoiser(), pipeline(str(saved("ddim"))).denoiser()
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in mine.state_dict().items())


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_a_transformer_of_an_early_folder_is_read(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(saved(name), tmp_path / "pipeline")
    changed(folder, "transformer/config.json", _class_name="Transformer2DModel")
    early, now = pipeline(str(folder)).denoiser(), pipeline(str(saved(name))).denoiser()
    assert type(early) is type(now)
    assert all(torch.equal(tensor, now.state_dict()[key]) for key, tensor in early.state_dict().items())


def test_latents_are_unscaled_as_their_autoencoder_says() -> None:
    decoder = PipelineDecoder(
        {"scaling_factor": 2.0, "shift_factor": 0.5, "block_out_channels": (4, 4, 4)}, lambda: None
    )
    latents = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    assert decoder.side == 4 and decoder._unscaled(latents).flatten().tolist() == [1.0, -0.5]
    own = {"scaling_factor": 2.0, "latents_mean": (1.0, 2.0), "latents_std": (4.0, 6.0), "block_out_channels": (4,)}
    assert PipelineDecoder(own, lambda: None)._unscaled(latents).flatten().tolist() == [3.0, -4.0]


def test_what_an_autoencoder_does_not_say_is_what_its_class_takes(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """vae/config.json of Stable Diffusion v1.4 on the hub has no scaling_factor."""
    folder = copy_of(saved("stable_diffusion"), tmp_path / "pipeline")
    file = folder / "vae" / "config.json"
    early = {name: value for name, value in json.loads(file.read_text()).items() if name != "scaling_factor"}
    file.write_text(json.dumps(early))
    decoder = pipeline(str(folder)).decoder
    assert isinstance(decoder, PipelineDecoder)
    assert torch.allclose(decoder._unscaled(torch.ones(1, 4, 1, 1)), torch.tensor(1 / 0.18215))


def test_packing_is_undone_by_unpacking() -> None:
    class Tokens(torch.nn.Module):
        def forward(self, hidden_states, timestep, img_ids, txt_ids, encoder_hidden_states):
            self.seen = hidden_states, img_ids, txt_ids
            return (hidden_states,)

    model, x = adapt(Tokens(), "FluxTransformer2DModel", (2, 4, 6)), torch.rand(3, 2, 4, 6)
    found = model(x, torch.zeros(3), encoder_hidden_states=torch.zeros(3, 5, 1))[0]
    tokens, places, text = model.seen
    assert torch.equal(found, x) and tokens.shape == (3, 6, 8) and text.shape == (5, 3)
    assert torch.equal(tokens[0, 4], x[0, :, 2:4, 2:4].flatten()) and places[4].tolist() == [0, 1, 1]


def changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def copy_of(folder: Path, target: Path) -> Path:
    import shutil

    return shutil.copytree(folder, target)


FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no index": ("ddim", lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    "broken index": ("ddim", lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
    "a class of the user's own": (
        "ddim",
        lambda f: changed(f, "model_index.json", _class_name="MyPipeline"),
        r"_class_name=MyPipeline.*does not have.*pass it to edadm\.quantize",
    ),
    "no scheduler": ("ddim", lambda f: changed(f, "model_index.json", scheduler=[None, None]), "and a scheduler"),
    "another input": (
        "stable_diffusion",
        lambda f: changed(f, "model_index.json", controlnet=["diffusers", "ControlNetModel"]),
        "has controlnet besides",
    ),
    "inpainting": (
        "stable_diffusion",
        lambda f: changed(f, "unet/config.json", in_channels=9),
        "takes 9 channels, its latents have 4",
    ),
    "another denoiser": (
        "ddim",
        lambda f: changed(f, "unet/config.json", _class_name="UNetMotionModel"),
        "its denoiser is a UNetMotionModel, known are UNet2DModel",
    ),
    "no text encoder": (
        "stable_diffusion",
        lambda f: changed(f, "model_index.json", text_encoder=[None, None]),
        "no text encoder for its UNet2DConditionModel",
    ),
    "other labels": (
        "ddim",
        lambda f: changed(f, "unet/config.json", class_embed_type="timestep"),
        "class_embed_type=timestep are no labels",
    ),
    "no size": ("ddim", lambda f: changed(f, "unet/config.json", sample_size=None), r"set model\.sample_shape"),
    "unknown layers": (
        "ddim",
        lambda f: changed(f, "unet/config.json", down_block_types=["SkipDownBlock2D", "AttnDownBlock2D"]),
        r"no role for down_blocks\.0\.skip_conv",
    ),
    "quantized": (
        "ddim",
        lambda f: changed(f, "unet/config.json", quantization_config={"quant_method": "edadm"}),
        r"quantized already \(edadm\).*load=",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_covered_is_named(
    fault: str, saved: Callable[[str], Path], tmp_path: Path, prompts: str
) -> None:
    name, spoil, message = FAULTS[fault]
    folder = copy_of(saved(name), tmp_path / "pipeline")
    spoil(folder)
    with pytest.raises(EdadmError, match=message):
        pipeline(str(folder), prompts=prompts if name in TEXTS and fault != "no text encoder" else None).denoiser()


def test_weights_of_another_network_are_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(saved("ddim"), tmp_path / "pipeline")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file({key: tensor for key, tensor in whole.items() if key != "conv_in.bias"}, file)
    with pytest.raises(EdadmError, match=r"does not fit UNet2DModel: missing conv_in\.bias"):
        pipeline(str(folder)).denoiser()
    save_file(whole | {"conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(EdadmError, match="unet cannot be read"):
        pipeline(str(folder)).denoiser()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(EdadmError, match="unet cannot be read"):
        pipeline(str(folder)).denoiser()


def test_what_is_given_must_fit(saved: Callable[[str], Path], prompts: str, tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match=r"sample_shape=\[4, 8, 8\].* takes 3 channels"):
        pipeline(str(saved("ddim")), sample_shape=(4, 8, 8))
    with pytest.raises(EdadmError, match="takes no prompts"):
        pipeline(str(saved("ddim")), prompts=prompts)
    with pytest.raises(EdadmError, match=r"set dataset\.prompts"):
        pipeline(str(saved("stable_diffusion"))).conditions()
    with pytest.raises(EdadmError, match="is no folder"):
        pipeline(str(tmp_path / "nowhere"))


def test_a_hub_name_without_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EdadmError, match=r"somebody/something .*could not be fetched .*hf download somebody/something"):
        pipeline("somebody/something")


def test_the_scheduler_that_cannot_be_converted_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(saved("ddpm"), tmp_path / "pipeline")
    changed(folder, "scheduler/scheduler_config.json", _class_name="LCMScheduler")
    with pytest.raises(EdadmError, match=r"scheduler is LCMScheduler.*sampler@calibration_sampler"):
        pipeline(str(folder)).own.sampler(4, 0.0)


def test_a_live_pipeline_is_known_by_all_that_makes_its_trajectories(tmp_path: Path) -> None:
    made = lambda: small_pipelines.stable_diffusion(tmp_path / "vocabulary")
    hashed = lambda pipe: live(pipe, Given(prompts=lambda: ((), PROMPTS))).sha256()
    first, other, texts, words = (made() for _ in range(4))
    assert hashed(first) == hashed(made())
    other.unet.conv_in.bias.data += 1
    texts.text_encoder.get_input_embeddings().weight.data += 1
    words.tokenizer.add_tokens(["word"])
    assert len({hashed(pipe) for pipe in (first, other, texts, words)}) == 4


def test_class_and_settings_of_a_pipeline_are_part_of_its_key(saved: Callable[[str], Path], tmp_path: Path) -> None:
    made = lambda: small_pipelines.stable_diffusion_xl(tmp_path / "vocabulary")
    hashed = lambda pipe: live(pipe, Given(prompts=lambda: ((), PROMPTS))).sha256()
    changed_pipe, derived = made(), made()
    changed_pipe.register_to_config(force_zeros_for_empty_prompt=False)
    derived.__class__ = type("Own", (type(derived),), {})
    assert len({hashed(pipe) for pipe in (made(), changed_pipe, derived)}) == 3
    folder = copy_of(saved("stable_diffusion_xl"), tmp_path / "pipeline")
    before = pipeline(str(folder)).sha256()
    changed(folder, "model_index.json", force_zeros_for_empty_prompt=False)
    assert pipeline(str(folder)).sha256() != before


def test_a_live_pipeline_keeps_its_denoiser(tmp_path: Path) -> None:
    pipe = small_pipelines.flux(tmp_path)
    task = live(pipe, Given(sample_shape=(4, 8, 8), prompts=lambda: ((), PROMPTS)))
    assert task.denoiser() is not pipe.transformer and not pipe.transformer._forward_pre_hooks
    assert task.denoiser()._forward_pre_hooks and all(p.requires_grad for p in pipe.transformer.parameters())


def test_a_live_pipeline_that_cannot_be_calibrated_is_named(tmp_path: Path) -> None:
    pipe = small_pipelines.ddim(tmp_path)
    with pytest.raises(EdadmError, match="a UNet2DModel is no diffusers pipeline"):
        live(pipe.unet, Given())
    pipe.unet._hf_hook = object()
    free = small_pipelines.stable_diffusion(tmp_path / "vocabulary")
    free.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(EdadmError, match=r"FreeU is on .*disable_freeu"):
        live(free, Given(prompts=lambda: ((), PROMPTS)))
    free.disable_freeu()
    live(free, Given(prompts=lambda: ((), PROMPTS)))
    with pytest.raises(EdadmError, match="offloaded: quantize first"):
        live(pipe, Given())
    del pipe.unet._hf_hook
    with pytest.raises(EdadmError, match=r"float16.*pipe\.to\(torch\.float32\)"):
        live(pipe.to(torch.float16), Given())


def test_every_family_has_its_call() -> None:
    from edadm.quant.families import FAMILIES

    assert set(CALLS) == {family.model for family in FAMILIES.values()}
