from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from edadm.errors import EdadmError
from edadm.metrics import clip

from .conftest import random_images
from .small_clip import CONTEXT, IMAGE_SIZE, MEAN, PATCH, STD, write_clip

PROMPTS = ["a photo of a cat", "a red car on a bridge at night", "two dogs", "a photo of a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "small")


@pytest.fixture(scope="module")
def network(folder) -> clip.ClipNetwork:
    return clip.load_network(f"local-dir:{folder}", None)


@pytest.fixture(scope="module")
def state(folder) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in load_file(folder / clip.FILES[0]).items()}


def layer_norm(x, state, name):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def transformer(x, state, name, heads, gelu, causal):
    """Pre-norm residual attention blocks, written down from the CLIP paper and its weights' names."""
    depth = 1 + max(int(key.split("resblocks.")[1].split(".")[0]) for key in state if key.startswith(f"{name}.resb"))
    for i in range(depth):
        block = f"{name}.resblocks.{i}"
        normed = layer_norm(x, state, f"{block}.ln_1")
        qkv = normed @ state[f"{block}.attn.in_proj_weight"].T + state[f"{block}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ state[f"{block}.attn.out_proj.weight"].T + state[f"{block}.attn.out_proj.bias"]
        hidden = (
            layer_norm(x, state, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].T
            + state[f"{block}.mlp.c_fc.bias"]
        )
        x = x + gelu(hidden) @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    return x


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def image_embedding(state, image):
    """The embedding of one uint8 image (3, S, S) at twice the model's size: bicubic by PIL, then the vision tower."""
    small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    x = torch.from_numpy((np.asarray(small) / 255 - np.array(MEAN)) / np.array(STD))
    side = IMAGE_SIZE // PATCH
    patches = x.reshape(side, PATCH, side, PATCH, 3).permute(0, 2, 4, 1, 3).reshape(1, side * side, -1)
    tokens = patches @ state["visual.conv1.weight"].flatten(1).T
    x = torch.cat([state["visual.class_embedding"].expand(1, 1, -1), tokens], 1) + state["visual.positional_embedding"]
    x = transformer(
        layer_norm(x, state, "visual.ln_pre"), state, "visual.transformer", heads=2, gelu=quick_gelu, causal=False
    )
    out = layer_norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]
    return (out / out.norm())[0]


def text_embedding(state, tokens):
    """The embedding of one row of tokens: the text tower at the end-of-text token, which has the largest number."""
    x = state["token_embedding.weight"][tokens][None] + state["positional_embedding"]
    x = layer_norm(transformer(x, state, "transformer", heads=2, gelu=quick_gelu, causal=True), state, "ln_final")
    out = x[:, tokens.argmax()] @ state["text_projection"]
    return (out / out.norm())[0]


def test_scores_equal_an_independent_computation(network, state):
    images = random_images(4, 2 * IMAGE_SIZE)
    found = clip.scores(clip.image_embeddings(images, network), clip.text_embeddings(PROMPTS, network))
    tokens = network.tokenize(PROMPTS)
    pairs = [(image_embedding(state, image), text_embedding(state, row)) for image, row in zip(images, tokens)]
    expected = [100 * max(0.0, float(image @ text)) for image, text in pairs]
    np.testing.assert_allclose(found, expected, atol=1e-3)  # float32 against float64, of 100
    assert len({round(value, 2) for value in expected}) > 2  # the pairs differ by far more than that


def test_a_score_is_a_hundred_times_the_cosine_and_never_negative():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    prompts = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(clip.scores(images, prompts), [100, 96, 0, 0], atol=1e-5)


def test_embeddings_have_length_one_and_equal_prompts_equal_rows(network, monkeypatch):
    texts = clip.text_embeddings(PROMPTS, network)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
    assert torch.equal(texts[0], texts[3]) and not torch.allclose(texts[0], texts[1], atol=1e-3)
    images = random_images(5, IMAGE_SIZE)
    whole = clip.image_embeddings(images, network)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5))
    monkeypatch.setattr(clip, "BATCH", 2)
    torch.testing.assert_close(clip.image_embeddings(images, network), whole, atol=1e-6, rtol=0)  # order of sums


def test_long_prompts_are_cut_at_the_context_length(network):
    tokens = network.tokenize(["a " * 50])
    assert tokens.shape == (1, CONTEXT) and tokens[0, -1] == 49407


def test_a_network_names_its_model_and_its_weights(network, folder):
    assert network.name == "small"  # never the place of the folder
    assert network.sha256 == hashlib.sha256((folder / clip.FILES[0]).read_bytes()).hexdigest()
    assert not any(parameter.requires_grad for parameter in network.model.parameters())
    assert clip.name_of("ViT-L-14", "openai") == "ViT-L-14 openai"


def test_loading_leaves_the_global_generator_alone(folder):
    before = torch.get_rng_state()
    clip.load_network(f"local-dir:{folder}", None)
    assert torch.equal(torch.get_rng_state(), before)


def test_published_weights_bring_their_activation_and_normalisation():
    openai, transform = clip._configuration("ViT-L-14", "openai")
    assert openai["quick_gelu"] is True and transform["mean"] == (0.48145466, 0.4578275, 0.40821073)
    assert clip._configuration("ViT-g-14", "laion2b_s12b_b42k")[0]["quick_gelu"] is False
    assert (transform["interpolation"], transform["resize_mode"]) == ("bicubic", "shortest")


@pytest.mark.parametrize(
    ("model", "tag", "parameters"),
    [("ViT-g-14", "laion2b_s12b_b42k", 1_366_678_273), ("ViT-L-14", "openai", 427_616_513)],
)
def test_the_published_architectures_build(model, tag, parameters):
    with torch.device("meta"):
        network = clip._build(clip._configuration(model, tag)[0], model)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.visual.image_size == (224, 224)


def test_a_weight_file_can_be_given_and_is_checked(folder, tmp_path, network):
    file = tmp_path / "own.pt"
    torch.save({"state_dict": load_file(folder / clip.FILES[0])}, file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    again = clip.load_network(f"local-dir:{folder}", None, file, sha256=found)
    assert again.sha256 == found
    images = random_images(2, IMAGE_SIZE)
    assert torch.equal(clip.image_embeddings(images, again), clip.image_embeddings(images, network))
    with pytest.raises(EdadmError, match=f"expected {'0' * 64}"):
        clip.find_weights(f"local-dir:{folder}", None, file, "0" * 64)


def test_unknown_models_and_weights_are_named_with_the_choices():
    with pytest.raises(EdadmError, match="open_clip knows no model ViT-X: choose for example ViT-g-14"):
        clip.find_weights("ViT-X", "openai")
    with pytest.raises(EdadmError, match="no weights openai of ViT-g-14: choose from laion2b_s12b_b42k"):
        clip.find_weights("ViT-g-14", "openai")
    with pytest.raises(EdadmError, match="no weights of ViT-L-14: give their file"):
        clip.find_weights("ViT-L-14", None)


def test_a_missing_file_says_which_one_is_wanted(tmp_path, folder):
    with pytest.raises(
        EdadmError, match=r"fetch open_clip_model\.safetensors of timm/vit_large_patch14_clip_224\.openai"
    ):
        clip.find_weights("ViT-L-14", "openai", tmp_path / "missing.safetensors")
    (tmp_path / clip.CONFIG).write_text((folder / clip.CONFIG).read_text())
    with pytest.raises(EdadmError, match=r"no CLIP weights at .*put open_clip_model\.safetensors beside"):
        clip.load_network(f"local-dir:{tmp_path}", None)
    with pytest.raises(EdadmError, match=r"no CLIP model in .*nowhere"):
        clip.load_network(f"local-dir:{tmp_path / 'nowhere'}", None)


def test_without_network_the_message_names_the_file_to_fetch(monkeypatch):
    import open_clip

    def offline(configuration):
        raise FileNotFoundError("Failed to download file\nmore")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(EdadmError) as error:
        clip.load_network()
    assert str(error.value).startswith(
        "cannot download CLIP ViT-g-14 laion2b_s12b_b42k (Failed to download file): fetch"
    )
    assert "laion/CLIP-ViT-g-14-laion2B-s12B-b42K" in str(error.value)


@pytest.mark.parametrize("fault", ["cut", "other network", "missing key", "nan"])
def test_files_that_do_not_fit_are_named(folder, tmp_path, fault):
    path = tmp_path / "weights.safetensors"
    tensors = load_file(folder / clip.FILES[0])
    if fault == "other network":
        tensors = {"conv.weight": torch.zeros(2)}
    elif fault == "missing key":
        del tensors["visual.proj"]
    elif fault == "nan":
        tensors["visual.proj"][0, 0] = torch.nan
    save_file(tensors, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EdadmError, match=r"weights\.safetensors"):
        clip.load_network(f"local-dir:{folder}", None, path)


def test_configurations_that_cannot_work_are_refused(folder, tmp_path):
    config = json.loads((folder / clip.CONFIG).read_text())

    def load(**changes):
        model = {**config["model_cfg"], **changes}
        (tmp_path / clip.CONFIG).write_text(json.dumps({**config, "model_cfg": model}))
        return clip.load_network(f"local-dir:{tmp_path}", None, folder / clip.FILES[0])

    with pytest.raises(EdadmError, match="a tower of another library"):
        load(vision_cfg={"timm_model_name": "vit_tiny_patch16_224", "image_size": 224})
    with pytest.raises(EdadmError, match="open_clip cannot build"):
        load(embed_dimension=3)
    small = {**config["model_cfg"]["text_cfg"], "vocab_size": 100}
    with pytest.raises(EdadmError, match=r"token_embedding\.weight has shape"):
        load(text_cfg=small)
    state = load_file(folder / clip.FILES[0])
    state["token_embedding.weight"] = state["token_embedding.weight"][:100].clone()
    save_file(state, tmp_path / clip.FILES[0])
    with pytest.raises(EdadmError, match="knows 100 tokens, CLIP's tokenizer has 49408"):
        clip.load_network(f"local-dir:{tmp_path}", None)
