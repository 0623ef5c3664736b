"""The trainings of the embedded latent tasks at a small width: a few steps, killed and continued, and what they export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from edadm.metrics import clip, clip_tiny
from edadm.report.page import with_block
from edadm.sampling.noise import EVALUATION
from edadm.tasks import cifar10_latent
from edadm.tasks.base import noise_prediction
from edadm.tasks.cifar10 import CLASSES, load_cifar10
from edadm.tasks.cifar10_latent import cifar10_dit_tiny, cifar10_ldm_tiny, cifar10_t2i_tiny
from edadm.tasks.compvis_unet import unet_config
from edadm.tasks.dit_checkpoint import dit_config
from edadm.tasks.first_stage import first_stage_config
from edadm.tasks.model_folder import empty_model, load_model
from edadm.tasks.text import encoder_of_folder
from experiments import card_latent, card_text
from experiments.training import captions, first_stage, latent_denoiser, latents, loop, modules, tokenizer
from experiments.training import clip as clip_training
from experiments.training.diffusion import Diffusion
from tests.experiments.test_train_tiny import killed, train
from tests.tasks import narrow_latent

TASKS = {"ldm": cifar10_ldm_tiny, "dit": cifar10_dit_tiny, "t2i": cifar10_t2i_tiny}
NAMES = {"first_stage": "cifar10_autoencoder", "clip": "cifar10_clip_tiny"} | {k: f"cifar10_{k}_tiny" for k in TASKS}


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_stage, "AUTOENCODER_PARAMS", narrow_latent.AUTOENCODER)
    monkeypatch.setattr(latent_denoiser, "LDM_PARAMS", narrow_latent.LDM)
    monkeypatch.setattr(latent_denoiser, "T2I_PARAMS", narrow_latent.T2I)
    monkeypatch.setattr(latent_denoiser, "DIT_PARAMS", narrow_latent.DIT)
    monkeypatch.setattr(clip_training, "MODEL", narrow_latent.CLIP)


@pytest.fixture(scope="module")
def exported(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every training exports after four steps."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as monkeypatch:
        narrow(monkeypatch)
        monkeypatch.setenv("EDADM_CIFAR10", str(images))
        monkeypatch.setenv("EDADM_CACHE", str(folder / "cache"))
        for what in NAMES:
            train(what, *words(what, folder), "--export", folder / NAMES[what])
    return folder


def words(what: str, folder: Path) -> list[Any]:
    parts = ["--autoencoder", folder / NAMES["first_stage"], "--clip", folder / NAMES["clip"]]
    return ["--epochs", 1, "--ema", 0.5, *(parts if what in TASKS else ())]


@pytest.mark.parametrize("what", NAMES)
def test_a_killed_training_ends_with_the_same_bits(
    what: str, exported: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch)
    killed(monkeypatch, 3, lambda: train(what, *words(what, exported)))
    train(what, *words(what, exported), "--export", data / "again")
    files = sorted(path.relative_to(data / "again") for path in (data / "again").rglob("*") if path.is_file())
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        if path.suffix == ".safetensors":
            first, again = load_file(exported / NAMES[what] / path), load_file(data / "again" / path)
            assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first), path
        else:
            assert (exported / NAMES[what] / path).read_bytes() == (data / "again" / path).read_bytes(), path


@pytest.mark.parametrize("what", TASKS)
def test_what_is_exported_is_the_task(what: str, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(cifar10_latent, "ASSETS", exported)
    monkeypatch.setattr(cifar10_latent, "AUTOENCODER", exported / NAMES["first_stage"] / "vae")
    task = TASKS[what]()
    network, rows = task.denoiser(), task.conditions().rows(EVALUATION, 1234, range(2))
    assert all(torch.equal(p, p.half().float()) for p in network.parameters())
    output = noise_prediction(network)(torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), **rows)
    assert output[:, :4].shape == (2, 4, 8, 8) and output.abs().max() > 0
    assert task.to_images()(torch.randn(2, 4, 8, 8)).shape == (2, 3, 32, 32) and task.sha256()
    kind: Any = getattr(diffusers, type(network).__name__)
    theirs = kind.from_pretrained(task.location() / ("transformer" if what == "dit" else "unet"))
    assert all(torch.equal(tensor.float(), network.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    facts = json.loads((task.location() / loop.FACTS).read_text())
    assert facts["steps"] == 4 and facts["batch"] == 5 and facts["loss_curve"] == []


@pytest.mark.parametrize("what", NAMES)
def test_a_training_continues_from_what_it_exported(
    what: str, exported: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch)
    for module in (first_stage, latent_denoiser, clip_training):
        monkeypatch.setattr(module, "optimise", lambda *given: [])
    train(what, *words(what, exported), "--init", exported / NAMES[what], "--export", data / "again")
    for path in (data / "again").rglob("*.safetensors"):
        kept = load_file(exported / NAMES[what] / path.relative_to(data / "again"))
        assert all(torch.equal(tensor, kept[key]) for key, tensor in load_file(path).items()), path


def test_latents_are_of_unit_deviation_and_computed_once(
    exported: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, _ = load_cifar10("train")
    autoencoder = exported / NAMES["first_stage"]
    made = latents.encoded(autoencoder, pixels, torch.device("cpu"))
    assert made.shape == (2, 20, 4, 8, 8) and float(made[0].std()) == pytest.approx(1, abs=1e-3)
    model = load_model(autoencoder / "vae")
    mirrored = torch.from_numpy(pixels[3, :, :, ::-1].copy()).float()[None] / 127.5 - 1
    with torch.no_grad():
        expected = model.encode(mirrored).latent_dist.mean * model.config.scaling_factor
    torch.testing.assert_close(made[1, 3:4], expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(latents, "encode", None)
    assert torch.equal(latents.encoded(autoencoder, pixels, torch.device("cpu")), made)


@pytest.mark.parametrize(("what", "word"), [("ldm", "first_stage"), ("t2i", "CLIP model")])
def test_a_part_that_is_not_there_is_named_before_anything_long(what: str, word: str, data: Path) -> None:
    with pytest.raises(SystemExit, match=rf"no .*{word}"):
        train(what, "--autoencoder", data / "nowhere", "--clip", data / "nowhere")


def test_one_token_a_word_and_the_same_numbers_in_both_libraries(exported: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    texts = [text for of_class in captions.captions() for text in of_class]
    ours = tokenizer.open_clip_tokenizer(exported / NAMES["clip"] / clip.VOCABULARY, 16)
    for text in texts:
        assert len(ours.encode(text)) == len(text.split())
    theirs = CLIPTokenizer.from_pretrained(exported / NAMES["t2i"] / "tokenizer")
    other = ["", "two Zebras!", "a photo of a cat wearing an astronaut suit on the moon at night in the winter"]
    for text, tokens in zip([*texts, *other], ours([*texts, *other])):
        found = theirs(text, padding="max_length", max_length=16, truncation=True).input_ids
        end = int(tokens.argmax())
        assert found[: end + 1] == tokens[: end + 1].tolist() and set(found[end + 1 :]) <= {ours.eot_token_id}, text


def test_merges_are_the_most_frequent_pairs_first() -> None:
    assert tokenizer.learn_merges(["ab", "ab", "abc"]) == [("a", "b</w>"), ("a", "b"), ("ab", "c</w>")]
    assert tokenizer.learn_merges(["aaa"]) == [("a", "a"), ("aa", "a</w>")]
    assert tokenizer.learn_merges(["a"]) == []


def test_the_text_encoder_is_the_clips_text_tower(exported: Path) -> None:
    small = clip.load_network(f"{clip.LOCAL}{exported / NAMES['clip']}", None)
    texts = ["a photo of a cat", "", "a ship in daylight"]
    hidden = encoder_of_folder(exported / NAMES["t2i"])(texts)
    tokens = small.tokenize(texts)
    with torch.no_grad():
        expected = small.model.encode_text(tokens)
        found = torch.stack([row[end] for row, end in zip(hidden, tokens.argmax(1))]) @ small.model.text_projection
    assert hidden.shape == (3, 16, narrow_latent.WIDTH)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(hidden[0], hidden[2], atol=1e-3)


def test_conditions_are_dropped_for_a_tenth_of_the_images() -> None:
    labels = torch.arange(2000) % 10

    def encode(texts):
        return torch.tensor([[[float(len(text))]] for text in texts])

    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    found = latent_denoiser.labelled(labels, draws[0])["class_labels"]
    kept = found != len(CLASSES)
    assert torch.equal(found[kept], labels[kept]) and 0.08 < 1 - float(kept.float().mean()) < 0.12
    texts = latent_denoiser.captioned(encode, torch.device("cpu"))(labels, draws[1])["encoder_hidden_states"][:, 0, 0]
    assert torch.equal(texts == 0, ~kept)  # the empty prompt
    lengths = [{float(len(text)) for text in of_class} for of_class in captions.captions()]
    assert all(float(text) in lengths[label] for text, label in zip(texts[kept], labels[kept]))


def test_captions_are_the_embedded_prompts_of_their_class() -> None:
    texts = captions.captions()
    assert [len(of_class) for of_class in texts] == [30] * 10
    for name, of_class in zip(CLASSES, texts):
        assert all(name in text.split() for text in of_class)


def test_equal_classes_belong_together() -> None:
    labels = torch.tensor([0, 0, 1])
    together = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    scale = torch.tensor(50.0)
    least = clip_training.contrastive_loss(together, together, scale, labels)
    assert float(least) == pytest.approx(2 / 3 * math.log(2), abs=1e-6)  # two of three rows have two equal answers
    apart = torch.tensor([[1.0, 0], [-1.0, 0], [0, 1.0]])
    assert clip_training.contrastive_loss(together, apart, scale, labels) > least + 1


def test_pixels_are_those_of_the_models_own_transform(exported: Path) -> None:
    from PIL import Image

    small = clip.load_network(f"{clip.LOCAL}{exported / NAMES['clip']}", None)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    expected = torch.stack([small.preprocess(Image.fromarray(image.transpose(1, 2, 0))) for image in pixels])
    torch.testing.assert_close(clip_training.normalised(pixels, torch.device("cpu")), expected)


@pytest.mark.parametrize("t", [1, 500, 999])
def test_the_variance_loss_is_the_divergence_of_two_gaussians(t: int) -> None:
    diffusion, rng = Diffusion("linear", 1e-4, 0.02, "cpu"), torch.Generator().manual_seed(0)
    x0, noise, eps = (torch.randn(1, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    v = torch.full_like(x0, 0.3)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    products = (1 - betas).cumprod(0)
    a, before, beta = products[t], products[t - 1], betas[t]
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    variance = beta * (1 - before) / (1 - a)

    def mean(clean: torch.Tensor) -> torch.Tensor:
        return before.sqrt() * beta / (1 - a) * clean + (1 - beta).sqrt() * (1 - before) / (1 - a) * x

    guess = (x - (1 - a).sqrt() * eps) / a.sqrt()
    log_variance = 0.65 * beta.log() + 0.35 * variance.log()
    expected = kl_divergence(Normal(mean(x0), variance.sqrt()), Normal(mean(guess), (log_variance / 2).exp()))
    found = diffusion.variance_loss(x0.float(), x.float(), torch.tensor([t]), eps.float(), v.float())
    assert float(found) == pytest.approx(float(expected.mean()) / math.log(2), rel=2e-3)


def test_the_variance_loss_moves_the_variance_alone_and_is_least_at_the_posterior() -> None:
    diffusion = Diffusion("linear", 1e-4, 0.02, "cpu")
    x0, noise, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 10, 400, 999])
    x = diffusion.noised(x0, t, noise)
    eps = noise.clone().requires_grad_()
    at_posterior = diffusion.variance_loss(x0, x, t, eps, torch.full_like(x0, -1))
    assert float(at_posterior.max()) < 1e-4
    v = torch.zeros_like(x0, requires_grad=True)
    diffusion.variance_loss(x0, x, t, eps, v).sum().backward()
    assert eps.grad is None and v.grad is not None and v.grad.abs().sum() > 0


def test_noisy_steps_count_fully_and_clean_ones_as_far_as_they_are_hard() -> None:
    diffusion = Diffusion("linear", 1e-4, 0.02, "cpu")
    t, noise = torch.tensor([0, 999]), torch.zeros(2, 1, 2, 2)
    found = diffusion.noise_loss(torch.ones(2, 1, 2, 2), noise, t)
    assert found.tolist() == pytest.approx([5 * 1e-4 / (1 - 1e-4), 1.0], rel=1e-3)


def test_first_weights_are_drawn_and_branches_start_at_zero() -> None:
    torch.manual_seed(0)
    unet = modules.fresh_unet(*unet_config(narrow_latent.LDM.unet)).eval()
    x = torch.randn(2, 4, 8, 8)
    assert not unet(x, torch.tensor([3, 4]), encoder_hidden_states=torch.randn(2, 1, 8)).sample.any()
    assert float(unet.conv_in.weight.detach().std()) > 0.01 and all(torch.isfinite(p).all() for p in unet.parameters())
    dit = modules.fresh_dit(*dit_config(narrow_latent.DIT)).eval()
    block = dit.transformer_blocks[0]
    assert block.norm1.emb.time_proj.downscale_freq_shift == 0 and not block.norm1.linear.weight.any()
    assert float(block.attn1.to_q.weight.detach().std()) > 0.1
    table = block.norm1.emb.class_embedder.embedding_table.weight
    assert table.shape[0] == 11 and 0.01 < float(table.detach().std()) < 0.04


def test_everything_fits_into_twelve_megabytes() -> None:
    import open_clip

    unets = [unet_config(params.unet) for params in (cifar10_latent.LDM_PARAMS, cifar10_latent.T2I_PARAMS)]
    autoencoder = first_stage_config(cifar10_latent.AUTOENCODER_PARAMS, 1.0)
    made = [empty_model(*config) for config in (*unets, dit_config(cifar10_latent.DIT_PARAMS), autoencoder)]
    vocabulary = 514 + len(tokenizer.learn_merges(captions.words(captions.captions())))
    architecture = clip_training.MODEL["text_cfg"] | {"vocab_size": vocabulary}
    with torch.device("meta"):
        small = open_clip.CLIP(**(clip_training.MODEL | {"text_cfg": architecture}))
    numbers = [sum(parameter.numel() for parameter in model.parameters()) for model in (*made, small)]
    text = sum(p.numel() for n, p in small.named_parameters() if not n.startswith("visual"))
    assert 2 * (sum(numbers) + text) < 11.7e6, numbers  # and 150 kB of tables of contents and vocabularies
    assert all(0.9e6 < number < 2.5e6 for number in numbers[:3])


def test_cards_say_what_was_measured(exported: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_latent, "ASSETS", exported)
    monkeypatch.setattr(cifar10_latent, "AUTOENCODER", exported / NAMES["first_stage"] / "vae")
    monkeypatch.setattr(clip_tiny, "FOLDER", exported / NAMES["clip"])
    records = data / "records"
    for asset in (NAMES["first_stage"], NAMES["clip"]):
        card_latent.main(["measure", asset, "--images", "20", "--records", str(records)])
    small = ["profile.steps=2", "chunk=20", "metrics.names=[is_tiny,clip_tiny]", "threads=1", "device=cpu"]
    line = ["measure", NAMES["t2i"], "--images", "20", "--records", str(records), "--scales", "1.5", "--words", *small]
    card_latent.main(line)
    card_latent.main(["cards", "--records", str(records)])
    record = json.loads((records / f"{NAMES['t2i']}.json").read_text())
    assert record["scores"].keys() == {"7.5", "1.5"} and record["n"] == 20
    page = (exported / NAMES["t2i"] / "README.md").read_text()
    assert "| 7.5 (the task) | " in page and f"{record['scores']['1.5']['clip_tiny']:.4g}" in page
    assert (exported / NAMES["t2i"] / "grid.png").is_file()
    autoencoder = (exported / NAMES["first_stage"] / "README.md").read_text()
    psnr = json.loads((records / f"{NAMES['first_stage']}.json").read_text())["psnr"]
    assert f"| PSNR (dB) | {psnr:.4g} |" in autoencoder
    assert "have no record yet" in (exported / NAMES["ldm"] / "README.md").read_text()


def test_every_embedded_card_shows_the_scores_of_its_record() -> None:
    there = [asset for asset in card_text.ABOUT if (card_latent.folder_of(asset) / loop.FACTS).is_file()]
    assert NAMES["first_stage"] in there
    for asset in there:
        folder = card_latent.folder_of(asset)
        record = json.loads((card_latent.RECORDS / f"{asset}.json").read_text())
        assert record["weights"] == card_latent.identity(folder), asset
        page = (folder / "README.md").read_text()
        assert page == with_block(page, card_latent.BLOCK, card_text.scores_block(asset, record)), asset
        assert card_text.SEEN not in page, asset


def test_a_grid_has_a_row_a_class() -> None:
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1)
    found = card_latent.by_class(images, [number % 10 for number in range(30)]).flatten().tolist()
    assert found[:6] == [0, 10, 20, 1, 11, 21] and len(found) == 30
