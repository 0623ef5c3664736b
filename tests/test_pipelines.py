"""The Python API: a pipeline is quantized, works on, is saved and loaded, equal to the bit."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edadm
from edadm import config, memory, pipelines, stages
from edadm.calibration.rows import CalibrationSet
from edadm.calibration.trajectories import Trajectories
from edadm.checkout import root
from edadm.errors import EdadmError
from edadm.quant import io
from tests.small_pipelines import PIPELINES, PROMPTS, TEXTS, ddim, stable_diffusion

pytest.importorskip("transformers")
SMALL = {"rows": 4, "iterations": 2, "steps": 3, "profile.range_batches": 2, "chunk": 2}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without the messages of diffusers and transformers about what is not installed."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_the_guide_names_every_word_that_is_refused() -> None:
    guide = (root() / "docs" / "pipelines.md").read_text(encoding="utf-8")
    assert [name for name in pipelines.NO_PART_OF_IT if f"`{name}`" not in guide] == []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quantized(pipe: Any, name: str, **choices: Any) -> Any:
    given: dict[str, Any] = {**SMALL, **choices}
    if name in TEXTS:
        given.setdefault("prompts", PROMPTS)
    if name == "flux":
        given["sample_shape"] = (4, 8, 8)
    return edadm.quantize(pipe, **given)


def images(pipe: Any, name: str) -> np.ndarray:
    arguments: dict[str, Any] = {"prompt": "a b c"} if name in TEXTS else {"class_labels": [3]} if name == "dit" else {}
    sizes = {"flux": {"height": 16, "width": 16}, "pixart": {"use_resolution_binning": False}}.get(name, {})
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe(**arguments, **sizes, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("name", PIPELINES)
def test_a_quantized_pipeline_works_on_and_loads_again_to_the_bit(name: str, cache: Path, tmp_path: Path) -> None:
    pipe = PIPELINES[name](tmp_path / "vocabulary")
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    before, denoiser = images(pipe, name), getattr(pipe, component)
    made = quantized(pipe, name)
    assert getattr(pipe, component) is denoiser and np.array_equal(images(pipe, name), before)

    module = getattr(made, component)
    assert type(made) is type(pipe) and type(module) is type(denoiser)
    assert (module.dtype, module.device) == (denoiser.dtype, denoiser.device)
    assert module.config["quantization_config"].bits["weight"] == 4
    assert json.dumps(io.config_of(module)) == json.dumps(io.config_of(denoiser))
    found = images(made, name)
    assert np.isfinite(found).all() and np.abs(found - before).max() > 1 / 255

    made.to("cpu").save_pretrained(tmp_path / "out")
    loaded = edadm.load_pipeline(tmp_path / "out")
    assert type(loaded) is type(made) and np.array_equal(images(loaded, name), found)
    loaded.save_pretrained(tmp_path / "again")
    saved, again = ((tmp_path / folder / component / io.PRETRAINED_WEIGHTS).read_bytes() for folder in ("out", "again"))
    assert saved == again


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion"])
def test_from_pretrained_of_diffusers_loads_the_whole_pipeline(name: str, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from diffusers import DiffusionPipeline

    made = quantized(PIPELINES[name](tmp_path / "vocabulary"), name, method="rtn")
    made.save_pretrained(tmp_path / "out")
    edadm.register()
    assert np.array_equal(images(DiffusionPipeline.from_pretrained(tmp_path / "out"), name), images(made, name))


def trajectories(cache: Path) -> Trajectories:
    (file,) = cache.glob(f"trajectories/*/{stages.TRAJECTORIES}")
    return Trajectories.load(file)


def test_calibration_samples_as_the_pipeline_does(cache: Path, tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path / "vocabulary")
    quantized(pipe, "stable_diffusion", method="rtn", calibration="tdac", guidance_scale=2.5)
    along = trajectories(cache)
    pipe.scheduler.set_timesteps(3)
    visited = list(dict.fromkeys(pipe.scheduler.timesteps.tolist()))
    assert along.timesteps.tolist() == visited  # the second call of PLMS' first step belongs to that step
    empty = pipe.encode_prompt("", pipe.device, 1, do_classifier_free_guidance=False)[0]
    assert torch.equal(along.null["encoder_hidden_states"], empty)
    assert along.features is not None and along.features.shape[1] == 2 * SMALL["chunk"]  # guided: two rows


@pytest.mark.parametrize(("scale", "guided"), [(None, True), (1.0, False), (0.0, False)])
def test_guidance_of_one_or_less_is_none(scale: float | None, guided: bool, cache: Path, tmp_path: Path) -> None:
    choices = {} if scale is None else {"guidance_scale": scale}
    quantized(stable_diffusion(tmp_path / "vocabulary"), "stable_diffusion", method="rtn", bits="w8a8", **choices)
    assert (trajectories(cache).null is not None) == guided


def test_any_word_of_the_command_line_can_be_given(cache: Path, tmp_path: Path) -> None:
    pipe = ddim(tmp_path)
    made = quantized(
        pipe, "ddim", method="qdiffusion", bits="w8a8", seed=3, calibration="uniform", reconstruction="layer",
        **{"bits.act": 6, "recipe.lr_weight": 0.1},
    )  # fmt: skip
    said = made.unet.config["quantization_config"]
    assert (said.bits["act"], said.method, said.seed) == (6, "qdiffusion", 3)
    assert said.variant["reconstruction"] == "layer" and said.variant["recipe.lr_weight"] == 0.1
    (reports,) = cache.glob(f"quantized/*/{stages.REPORTS}")
    assert len(json.loads(reports.read_text())) > 20  # a report per layer and phase


def test_the_same_call_finds_what_it_has_made(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quantized(ddim(tmp_path), "ddim")
    monkeypatch.setattr(stages, "reconstruct", None)
    monkeypatch.setattr(stages, "collect", None)
    assert np.array_equal(images(quantized(ddim(tmp_path), "ddim"), "ddim"), images(first, "ddim"))
    with pytest.raises(TypeError):
        quantized(ddim(tmp_path), "ddim", seed=1)


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion", "flux"])
def test_time_and_memory_are_said_before_anything_runs(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pipelines.logger, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(stages, "collect", None)
    pipe = PIPELINES[name](tmp_path / "vocabulary")
    with pytest.raises(TypeError):
        quantized(pipe, name)
    for words in ("on cpu: 4 rows, ", "; about ", "\ntrajectories: ", "\nmemory: inputs and targets of up to "):
        assert words in said[-1]


@pytest.mark.parametrize(("given", "needs"), [(0.0, "sampling the trajectories"), (1e5, "the reconstruction")])
def test_too_little_memory_is_an_error_before_anything_runs(
    given: float, needs: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"device": given, "host": given, "disk": given}
    monkeypatch.setattr(memory, "free_bytes", lambda run: free)
    with pytest.raises(EdadmError, match=f"{needs} needs at least .* fewer rows"):
        quantized(ddim(tmp_path), "ddim")
    assert not cache.exists()


def test_rows_of_ones_own_have_conditions(cache: Path, tmp_path: Path) -> None:
    context = {"encoder_hidden_states": torch.rand(6, 8, 8)}
    null = {"encoder_hidden_states": torch.rand(1, 8, 8)}
    rows = CalibrationSet(torch.rand(6, 4, 8, 8), torch.arange(6) * 100, torch.arange(6), context, null)
    file = rows.save(tmp_path / "rows.safetensors", {})
    pipe = stable_diffusion(tmp_path / "vocabulary")
    made = quantized(pipe, "stable_diffusion", calibration_set=str(file), reconstruction="layer")
    assert made.unet.is_quantized


def test_rows_of_ones_own_calibrate(cache: Path, tmp_path: Path) -> None:
    rows = CalibrationSet(torch.rand(4, 3, 8, 8), torch.arange(4) * 100, torch.arange(4))
    file = rows.save(tmp_path / "rows.safetensors", {})
    assert quantized(ddim(tmp_path), "ddim", method="rtn", calibration_set=str(file)).unet.is_quantized
    assert not list(cache.glob("trajectories/*"))
    with pytest.raises(EdadmError, match="holds 4 rows, 6 are needed"):
        quantized(ddim(tmp_path), "ddim", calibration_set=str(file), rows=6)


def test_a_quantized_denoiser_of_the_cache_goes_into_its_pipeline(cache: Path, tmp_path: Path) -> None:
    pipe = ddim(tmp_path)
    made = quantized(pipe, "ddim", method="rtn")
    pipe.save_pretrained(tmp_path / "pipe")
    (folder,) = cache.glob("quantized/*/")
    loaded = edadm.load_pipeline(tmp_path / "pipe", quantized=folder)
    assert np.array_equal(images(loaded, "ddim"), images(made, "ddim"))
    with pytest.raises(EdadmError, match=r"nothing in .*pipe is quantized"):
        edadm.load_pipeline(tmp_path / "pipe")
    stable_diffusion(tmp_path / "vocabulary").save_pretrained(tmp_path / "texts")
    with pytest.raises(EdadmError, match=r"holds a UNet2DModel, the unet of .*texts is a UNet2DConditionModel"):
        edadm.load_pipeline(tmp_path / "texts", quantized=folder)
    with pytest.raises(EdadmError, match=r"no model_index\.json"):
        edadm.load_pipeline(tmp_path / "nowhere")


def test_a_folder_of_another_class_or_with_a_broken_part_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    ddim(tmp_path).save_pretrained(folder)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(EdadmError, match=r"unet/config\.json cannot be read as JSON"):
        edadm.load_pipeline(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "MyPipeline"}))
    with pytest.raises(EdadmError, match="_class_name=MyPipeline"):
        edadm.load_pipeline(folder)


def xformers(pipe: Any) -> None:
    class XFormersAttnProcessor:
        pass

    next(iter(pipe.unet.mid_block.attentions)).transformer_blocks[0].attn1.set_processor(XFormersAttnProcessor())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (xformers, "XFormersAttnProcessor"),
        (lambda pipe: pipe.unet.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
        (lambda pipe: pipe.enable_attention_slicing(), "SlicedAttnProcessor"),
    ],
)
def test_attention_that_hides_its_products_is_named_before_anything_runs(
    change: Callable[[Any], None], found: str, cache: Path, tmp_path: Path
) -> None:
    pipe = stable_diffusion(tmp_path / "vocabulary")
    change(pipe)
    with pytest.raises(EdadmError, match=f"uses {found}"):
        quantized(pipe, "stable_diffusion")
    assert not cache.exists()


def test_layers_that_were_added_are_named_before_anything_runs(cache: Path, tmp_path: Path) -> None:
    pipe = ddim(tmp_path)
    pipe.unet.conv_in = torch.nn.Sequential(pipe.unet.conv_in)  # as adapters do
    with pytest.raises(EdadmError, match=r"no role for conv_in\.0"):
        quantized(pipe, "ddim")
    assert not cache.exists()


def test_quantized_attention_is_not_switched_back(cache: Path, tmp_path: Path) -> None:
    made = quantized(stable_diffusion(tmp_path / "vocabulary"), "stable_diffusion", method="rtn", bits="w8a8")
    with pytest.raises(EdadmError, match="quantized attention products"):
        made.enable_attention_slicing()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"method": "nope"}, "method=nope: choose .*edadm"),
        ({"bits": "w9a9"}, "bits=w9a9: choose .*w4a8"),
        ({"bits": "w32a32"}, "nothing to quantize"),
        ({"calibration": "nope"}, "calibration=nope: choose .*tdac"),
        ({"sede": 1}, "sede"),
        ({"rows": 0}, r"profile\.rows=0"),
        ({"rows": 4, "batch": 8}, r"profile\.batch=8 is more than profile\.rows=4"),
        ({"guidance_scale": 3.0}, "unconditional"),
        ({"prompts": PROMPTS}, "takes no prompts"),
        ({"sample_shape": (4, 8, 8)}, "takes 3 channels"),
        ({"n_images": 3}, r"n_images is no choice of edadm\.quantize"),
        ({"model.path": "x"}, r"model\.path is no choice"),
        ({"device": "cuda:7"}, "no GPU here"),
    ],
)
def test_an_impossible_choice_is_named_before_anything_runs(
    choices: dict[str, Any], message: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EdadmError, match=message):
        quantized(ddim(tmp_path), "ddim", **choices)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("name", "shape"), [("flux", (4, 7, 7)), ("stable_diffusion_3", (4, 32, 32)), ("pixart", (4, 9, 9)), ("ddim", (3, 7, 7))]
)  # fmt: skip
def test_a_sample_shape_is_tried_before_anything_runs(
    name: str, shape: tuple[int, int, int], cache: Path, tmp_path: Path
) -> None:
    pipe, prompts = PIPELINES[name](tmp_path / "vocabulary"), PROMPTS if name in TEXTS else None
    with pytest.raises(EdadmError, match=r"does not take samples of .* set model\.sample_shape"):
        edadm.quantize(pipe, **SMALL, prompts=prompts, sample_shape=shape)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("prompts", "message"), [(None, r"pass prompts=\[\.\.\.\]"), ([], "the list is empty"), ([3], "a list of texts")]
)
def test_prompts_of_a_text_to_image_pipeline_are_needed(
    prompts: Any, message: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdadmError, match=message):
        quantized(stable_diffusion(tmp_path / "vocabulary"), "stable_diffusion", prompts=prompts)
    assert not cache.exists()


def test_prompts_are_also_read_from_a_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    made = lambda prompts: quantized(
        stable_diffusion(tmp_path / "vocabulary"), "stable_diffusion", method="rtn", bits="w8a8", prompts=prompts
    )
    made(tmp_path / "prompts.txt")
    made(PROMPTS)
    assert len(list(cache.glob("trajectories/*/"))) == 1


def test_what_is_quantized_is_not_quantized_again(cache: Path, tmp_path: Path) -> None:
    made = quantized(ddim(tmp_path), "ddim", method="rtn")
    with pytest.raises(EdadmError, match="quantized already"):
        quantized(made, "ddim", method="rtn")


def test_the_wheel_alone_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CONF", tmp_path / "conf")
    with pytest.raises(EdadmError, match=r"pip install -e \."):
        quantized(ddim(tmp_path), "ddim")


def test_every_public_name_is_there_and_nothing_else() -> None:
    for name in edadm.__all__:
        assert getattr(edadm, name) is getattr(pipelines if name != "EdadmError" else edadm.errors, name)
    with pytest.raises(AttributeError, match="nope"):
        importlib.import_module("edadm").nope  # noqa: B018


@pytest.mark.parametrize(
    ("value", "word"), [(3, "3"), (None, "null"), (True, "true"), ("a/b.c", "a/b.c"), ("it's, $x", r"'it\'s, $x'"), ([1, 2], "[1, 2]")]
)  # fmt: skip
def test_values_become_words_of_the_command_line(value: Any, word: str) -> None:
    assert pipelines._value(value) == word


DOCUMENT = (Path(__file__).resolve().parent.parent / "docs" / "pipelines.md").read_text(encoding="utf-8")


def test_the_code_of_the_document_runs(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    five_lines, own_loader = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    monkeypatch.chdir(tmp_path)
    stable_diffusion(tmp_path / "vocabulary").save_pretrained("my_pipeline")
    small = five_lines.replace("rows=64, iterations=200", "rows=4, iterations=2, steps=3, reconstruction='layer'")
    assert small != five_lines
    names: dict[str, Any] = {}
    exec(small, names)
    assert names["image"].size == (16, 16) and names["pipe"].unet.is_quantized
    if importlib.util.find_spec("accelerate") is not None:
        again: dict[str, Any] = {}
        exec(own_loader, again)
        expected = images(names["pipe"], "stable_diffusion")
        assert np.array_equal(images(again["pipe"], "stable_diffusion"), expected)
