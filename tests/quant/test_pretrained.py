from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edadm.errors import EdadmError
from edadm.quant import io, pretrained
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel, SitePlan
from edadm.quant.ranges import MinMax
from tests.toys import DENOISERS

PLAN = SitePlan(edge={"output": {"weight": 8, "act": 32}})
FACTS = {"method": "rtn", "seed": 3}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings about position numbers with a batch axis and about accelerate."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@torch.no_grad()
def quantized(name: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A quantized denoiser of diffusers, its inputs and its output."""
    inputs = DENOISERS[name].inputs(2)
    network = QuantModel.wrap(DENOISERS[name].build(), Bits(4, 8), PLAN)
    set_weight_ranges(network, MinMax())
    set_activation_ranges(network, MinMax(), [lambda: network(**inputs)])
    return pretrained.as_denoiser(network, **FACTS), inputs, network(**inputs)[0]


def weights(folder: Path) -> bytes:
    return (folder / io.PRETRAINED_WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_is_saved_and_loaded_to_the_bit_and_stays_of_its_class(name: str, tmp_path: Path) -> None:
    model, inputs, expected = quantized(name)
    assert type(model).__name__ == DENOISERS[name].build().__class__.__name__ and model.dtype == torch.float32
    model.save_pretrained(tmp_path / "once")
    loaded = io.load(tmp_path / "once")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], expected) and torch.equal(copy.deepcopy(model)(**inputs)[0], expected)
    pretrained.as_denoiser(loaded, **FACTS).save_pretrained(tmp_path / "twice")
    assert weights(tmp_path / "once") == weights(tmp_path / "twice")
    assert (tmp_path / "once" / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()
    said = io.read_description(tmp_path / "once")
    assert (said["bits"]["weight"], said["plan"]["edge"], said["seed"]) == (4, {"output": PLAN.edge["output"]}, 3)


@pytest.mark.parametrize("name", DENOISERS)
def test_from_pretrained_of_diffusers_loads_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, inputs, expected = quantized(name)
    model.save_pretrained(tmp_path / "once")
    loaded, found = type(model).from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], expected)
    loaded.save_pretrained(tmp_path / "twice")
    assert weights(tmp_path / "once") == weights(tmp_path / "twice")


def test_from_pretrained_says_what_a_file_lacks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file, save_file

    model, _, _ = quantized("unet2d")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / io.PRETRAINED_WEIGHTS)
    del stored["conv_in.weight_quantizer.codes"]
    save_file(stored, tmp_path / io.PRETRAINED_WEIGHTS)
    with pytest.raises(EdadmError, match=r"lacks conv_in\.weight_quantizer\.codes"):
        type(model).from_pretrained(tmp_path)


def test_from_pretrained_without_accelerate_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = quantized("unet2d")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EdadmError, match=r"accelerate.* or use edadm\.load_pipeline"):
        type(model).from_pretrained(tmp_path)


def test_the_loader_of_diffusers_does_not_quantize_and_keeps_float32() -> None:
    config_class, quantizer_class = pretrained.register()
    with pytest.raises(EdadmError, match=r"call edadm\.quantize"):
        quantizer_class(config_class(), pre_quantized=False)
    with pytest.raises(EdadmError, match="float16, in which"):
        quantizer_class(config_class()).update_torch_dtype(torch.float16)


def test_a_pipelines_quantization_config_refuses_to_quantize(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler, PipelineQuantizationConfig

    DDIMPipeline(DENOISERS["unet2d"].build(), DDIMScheduler()).save_pretrained(tmp_path)
    config_class, _ = pretrained.register()
    asked = PipelineQuantizationConfig(quant_mapping={"unet": config_class(**io.quantization_of(_network()))})
    with pytest.raises(EdadmError, match=r"call edadm\.quantize"):
        DDIMPipeline.from_pretrained(tmp_path, quantization_config=asked)


def _network() -> QuantModel:
    return QuantModel.wrap(DENOISERS["unet2d"].build(), Bits(4, 8))


def test_another_type_is_refused() -> None:
    model, inputs, expected = quantized("unet2d")
    for change in (model.half, model.double, lambda: model.to(torch.bfloat16), lambda: model.to("cpu", torch.float16)):
        with pytest.raises(EdadmError, match=r"stays in float32.*torch\.autocast"):
            change()
    for same in (
        lambda: model.to("cpu"),
        model.float,
        lambda: model.to(None, torch.float32),
        lambda: model.to(device="cpu"),
    ):
        assert same() is model
    with torch.no_grad():
        assert model.dtype == torch.float32 and torch.equal(model(**inputs)[0], expected)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model, _, _ = quantized("unet2d")
    for options in ({"safe_serialization": False}, {"variant": "fp16"}):
        with pytest.raises(EdadmError, match="safetensors"):
            model.save_pretrained(tmp_path, **options)
    (tmp_path / f"{io.PRETRAINED_WEIGHTS}.index.json").touch()
    with pytest.raises(EdadmError, match=r"index\.json belongs to other weights"):
        model.save_pretrained(tmp_path)


def test_a_folder_of_something_else_is_no_quantized_model(tmp_path: Path) -> None:
    DENOISERS["unet2d"].build().save_pretrained(tmp_path)
    with pytest.raises(EdadmError, match=r"config\.json has no quantization_config of ours"):
        io.load(tmp_path)
    assert pretrained.quantized_component(tmp_path) is None
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "gguf"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EdadmError, match="of ours"):
        io.read_description(tmp_path)
