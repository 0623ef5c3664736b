"""Every task reads its weights as the original file and as a folder, and says what is wrong with others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from edadm.errors import EdadmError
from edadm.keys import _decoder_key
from edadm.sampling.generate import truncated_to_uint8
from edadm.sampling.noise import EVALUATION
from edadm.tasks import weights
from edadm.tasks.base import noise_prediction
from edadm.tasks.cifar10_ddim import cifar10_ddim
from edadm.tasks.dit import imagenet_dit
from edadm.tasks.latent import DECODED_AT_ONCE, latent_task
from edadm.tasks.ldm_checkpoint import load_ldm, save_ldm
from edadm.tasks.model_folder import load_model
from edadm.tasks.stable_diffusion import coco_sd14, drawbench_sd14
from tests.tasks import originals
from tests.tasks.narrow import SHAPES, TEXT, dit_folder, ldm_folder, pipeline_folder
from tests.toys import tiny_unet

CLASSES = originals.LDM.n_classes - 1


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional latent diffusion checkpoint in the original layout."""
    path = tmp_path_factory.mktemp("original") / "model.ckpt"
    torch.save({"state_dict": originals.ldm_state(), "global_step": 3}, path)
    return path


def test_an_original_checkpoint_and_its_folder_are_the_same_task(original: Path, tmp_path: Path) -> None:
    model = load_ldm(original, originals.LDM)
    save_ldm(model, tmp_path / "folder")
    of_file, of_folder = (latent_task("toy", originals.LDM, str(p), (3, 8, 8)) for p in (original, tmp_path / "folder"))
    latents = torch.randn(DECODED_AT_ONCE + 2, 3, 8, 8)
    expected = truncated_to_uint8(model.first_stage.decode(latents / 0.25).sample)  # scale_factor of the checkpoint
    for task in (of_file, of_folder):
        read = task.denoiser().state_dict()
        assert all(torch.equal(read[name], tensor) for name, tensor in model.unet.state_dict().items())
        condition = task.conditions().rows(EVALUATION, 1234, range(CLASSES))["encoder_hidden_states"]
        weight = model.class_embedder.embedding.weight
        assert torch.equal(condition.flatten(1).sort(0).values, weight[:CLASSES].sort(0).values)
        assert torch.equal(task.conditions().null["encoder_hidden_states"][0, 0], weight[CLASSES])
        images = task.to_images()(latents)
        assert images.dtype == torch.uint8 and images.shape == (10, 3, 16, 16)
        assert (images.int() - expected.int()).abs().max() <= 1  # batches of the decoder differ in their sums
    assert of_file.sha256() != of_folder.sha256()


def test_the_hash_follows_every_part_of_the_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = ldm_folder("imagenet_ldm4", tmp_path / "model")
    found = {latent_task("toy", originals.LDM, str(folder)).sha256()}
    for file in ("unet/config.json", "vae/diffusion_pytorch_model.safetensors", "ldm.safetensors"):
        path = folder / file
        if path.suffix == ".json":
            path.write_text(path.read_text() + " ")
        else:
            save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
        found.add(latent_task("toy", originals.LDM, str(folder)).sha256())
    assert len(found) == 4


def test_church_has_its_heads_also_from_a_folder(tmp_path: Path) -> None:
    folder = ldm_folder("lsun_church_ldm8", tmp_path)
    unconditional = dataclasses.replace(originals.LDM, n_classes=None)
    task = latent_task("toy", unconditional, str(folder), SHAPES["lsun_church_ldm8"])
    assert {module.heads for module in task.denoiser().modules() if hasattr(module, "to_q")} == {8}


def test_a_checkpoint_of_another_model_is_named(original: Path, tmp_path: Path) -> None:
    wide = dataclasses.replace(originals.UNET, model_channels=16)
    with pytest.raises(EdadmError, match="another model"):
        latent_task("toy", dataclasses.replace(originals.LDM, unet=wide), str(original)).denoiser()
    torch.save(originals.ldm_state(), tmp_path / "dit.pt")
    with pytest.raises(EdadmError, match="latent diffusion checkpoint"):
        imagenet_dit(str(tmp_path / "dit.pt")).denoiser()


def test_a_truncated_download_is_named(original: Path, tmp_path: Path) -> None:
    part = tmp_path / "model.ckpt"
    part.write_bytes(original.read_bytes()[:5000])
    with pytest.raises(EdadmError, match=r"model\.ckpt \(0\.0 MB\).*truncated"):
        latent_task("toy", originals.LDM, str(part)).denoiser()


def test_a_folder_that_is_no_latent_diffusion_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match=r"has no unet.*save_ldm"):
        latent_task("toy", originals.LDM, str(tmp_path)).denoiser()
    with pytest.raises(EdadmError, match="does not exist: get it there"):
        latent_task("toy", originals.LDM, str(tmp_path / "nowhere"), remedy="get it there").sha256()


def test_a_hub_name_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EdadmError, match=r"nobody/nothing is no file or folder here.*hf download nobody/nothing"):
        imagenet_dit("nobody/nothing")
    assert weights.local("nobody/nothing") is None


def test_dit_from_the_hub_has_the_constants_of_the_original(tmp_path: Path) -> None:
    task = imagenet_dit(str(dit_folder(tmp_path)), sample_shape=(4, 8, 8), classes=5)
    network = task.denoiser()
    for block in network.transformer_blocks:
        assert block.norm1.emb.time_proj.downscale_freq_shift == 0 and block.norm3.eps == 1e-6
    condition = task.conditions().rows(EVALUATION, 1234, range(2))
    output = noise_prediction(network)(torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), **condition)
    assert output.shape == (2, 8, 8, 8) and task.learned_variance and task.guided_channels == 3
    assert task.to_images()(torch.randn(2, 4, 8, 8)).shape == (2, 3, 64, 64)


def test_dit_rounds_its_pixels_as_its_own_script_does(tmp_path: Path) -> None:
    task = imagenet_dit(str(dit_folder(tmp_path)), sample_shape=(4, 8, 8), classes=5)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        pixels = load_model(tmp_path / "vae").decode(latents / 0.18215).sample
    expected = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
    off = (task.to_images()(latents).int() - expected.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.01  # half of them would be cut
    compvis = latent_task("toy", originals.LDM, str(tmp_path))
    assert _decoder_key(task.decoder)["decoder"]["to_bytes"] == "to_uint8"
    assert _decoder_key(compvis.decoder)["decoder"]["to_bytes"] == "truncated_to_uint8"


def test_an_original_dit_needs_an_autoencoder(tmp_path: Path) -> None:
    torch.save(originals.dit_state(), tmp_path / "dit.pt")
    task = imagenet_dit(str(tmp_path / "dit.pt"), sample_shape=(4, 8, 8), classes=10, params=originals.DIT)
    assert task.denoiser().config.num_layers == 2
    with pytest.raises(EdadmError, match=r"no autoencoder: set model\.first_stage"):
        task.to_images()(torch.zeros(1, 4, 8, 8))
    vae = dit_folder(tmp_path / "pipeline") / "vae"
    whole = imagenet_dit(str(tmp_path / "dit.pt"), str(vae), (4, 8, 8), 10, params=originals.DIT)
    assert whole.to_images()(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 64, 64) and whole.sha256() != task.sha256()


def test_cifar10_reads_early_folders_with_pickled_weights(tmp_path: Path) -> None:
    model = tiny_unet()
    model.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    early = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = model.state_dict()
    for current, name in early.items():
        state = {key.replace(current, name): tensor for key, tensor in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    read = cifar10_ddim(str(tmp_path)).denoiser().state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


def test_stable_diffusion_without_prompts_or_transformers_says_so(tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match=r"dataset\.prompts is not set"):
        coco_sd14(path=str(tmp_path)).conditions()


def test_stable_diffusion_encodes_prompts_as_its_text_encoder_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import CLIPTextModel, CLIPTokenizer

    folder, prompts = pipeline_folder(tmp_path / "model"), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a b", "c d e f g h i j k", *"abcdefgh"]))
    task = coco_sd14(path=str(folder), prompts=str(prompts), sample_shape=(4, 8, 8))
    rows = task.conditions().rows(EVALUATION, 1234, range(2))["encoder_hidden_states"]
    encoder, tokenizer = (
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )
    ids = tokenizer(
        ["a b", "c d e f g h i j k"], padding="max_length", max_length=7, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = encoder(ids.input_ids).last_hidden_state
    assert torch.allclose(rows, expected) and rows.shape == (2, 7, 8)
    output = noise_prediction(task.denoiser())(
        torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), encoder_hidden_states=rows
    )
    assert output.shape == (2, 4, 8, 8)
    assert task.to_images()(torch.randn(2, 4, 8, 8)).shape == (2, 3, 64, 64)


def test_a_pipeline_that_predicts_no_noise_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.parent.mkdir()
    for content in ("{}", '{"prediction_type": "epsilon"}'):
        config.write_text(content)
        coco_sd14(path=str(tmp_path))
    config.write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(EdadmError, match=r"prediction_type=v_prediction.*task=pipeline"):
        drawbench_sd14(path=str(tmp_path))
    config.write_text("[")
    with pytest.raises(EdadmError, match=r"scheduler_config\.json cannot be read"):
        coco_sd14(path=str(tmp_path))


def test_the_text_encoder_of_an_original_checkpoint_is_padded_with_its_end(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import CLIPTextConfig, CLIPTextModel

    from edadm.tasks import text

    config = text.CLIP_VIT_L_14 | {
        key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(**config)).eval()
    state = {key.removeprefix("text_model."): t for key, t in model.state_dict().items() if "position_ids" not in key}
    made = text.encoder_of_state(state, "sd-v1-4.ckpt", config)(["a cat", ""])
    ids = torch.full((2, 77), 49407)
    ids[0, :3] = torch.tensor([49406, 320, 2368])  # start, a, cat in CLIP's vocabulary
    ids[1, 0] = 49406
    with torch.no_grad():
        assert torch.allclose(made, model(ids).last_hidden_state, atol=1e-6)
    with pytest.raises(EdadmError, match=r"text encoder.*missing"):
        text.encoder_of_state({}, "sd-v1-4.ckpt", config)
