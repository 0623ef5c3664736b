from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_processor

from edadm.errors import EdadmError
from edadm.quant import layers
from edadm.quant.calibrate import set_activation_ranges
from edadm.quant.layers import AttentionMatmul
from edadm.quant.network import Bits, QuantModel
from edadm.quant.quantizer import quantize_dequantize
from edadm.quant.ranges import MSE, MinMax
from tests.toys import DENOISERS, conditional_unet, sd3_transformer, tiny_unet


@pytest.fixture
def matmul():
    """Products at 8 bits with a range, and q, k, v of 3 rows, 2 heads, 4 queries and 5 keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 6, generator=generator) for n in (4, 5, 5))
    module = AttentionMatmul("attn.matmul", "attention", 8, 8)
    for quantizer, x in zip(module.quantizers, (q, k, v, torch.tensor([0.0, 1.0]))):
        MinMax().update(quantizer, x)
        quantizer.enabled = True
    return module, (q, k, v)


@torch.no_grad()
def test_products_are_those_of_the_four_quantized_operands(matmul):
    module, (q, k, v) = matmul
    quantized = [quantize_dequantize(x, s.scale, s.zero_point, 256) for s, x in zip(module.quantizers, (q, k, v))]
    weights = (quantized[0] @ quantized[1].transpose(-1, -2) / 6**0.5).softmax(-1)
    expected = quantize_dequantize(weights, module.w.scale, module.w.zero_point, 256) @ quantized[2]
    assert torch.allclose(module(q, k, v), expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_hides_keys_however_it_is_given_and_the_rows_are_parted(matmul, rows, monkeypatch):
    monkeypatch.setitem(layers.LOGITS_AT_A_TIME, "cpu", rows * 2 * 4 * 5)
    module, (q, k, v) = matmul
    seen = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    seen[1, ..., 3:] = False
    added = torch.zeros(3, 1, 1, 5).masked_fill(~seen, -10000.0)
    masked = module(q, k, v, seen)
    assert torch.equal(masked, module(q, k, v, added))
    assert torch.equal(masked[1], module(q[1:2], k[1:2, :, :3], v[1:2, :, :3])[0])
    assert torch.equal(masked[[0, 2]], module(q, k, v)[[0, 2]])


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_sees_image_and_context_tokens_together(name):
    denoiser = DENOISERS[name]
    network, inputs, seen = QuantModel.wrap(denoiser.build(), Bits(8, 8)), denoiser.inputs(2), {}
    for matmul in network.matmuls.values():
        matmul.register_forward_pre_hook(lambda module, parts: seen.update({module.name: parts[0].shape}))
    network(**inputs)
    image, context = (16, 4) if name == "sd3" else (6, 4)
    only_image = {"transformer_blocks.0.attn2.matmul"}
    assert {matmul: shape[2] for matmul, shape in seen.items()} == {
        matmul: image if matmul in only_image else image + context for matmul in network.matmuls
    }


@torch.no_grad()
def test_softmax_bits_are_their_own_and_cross_attention_has_its_own_quantizers():
    network = QuantModel.wrap(conditional_unet(), Bits(4, 6, softmax=8))
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    bits = {site.name: (site.role, site.bits) for site in network.sites() if site.kind == "matmul"}
    for attention, role in (("attn1", "attention"), ("attn2", "cross_attention")):
        found = [bits[f"{block}.{attention}.matmul.{operand}"] for operand in "qkvw"]
        assert found == [(role, 6)] * 3 + [(role, 8)]


@torch.no_grad()
@pytest.mark.parametrize("rule", [MinMax(), MSE()])
def test_the_softmax_over_one_key_stays_one(rule):
    denoiser = DENOISERS["unet2d_condition"]  # a single context token, as in LDM-4 ImageNet
    network, inputs = QuantModel.wrap(denoiser.build(), Bits(32, 8)), denoiser.inputs(3)
    set_activation_ranges(network, rule, [lambda: network(**inputs)])
    cross = next(matmul for name, matmul in network.matmuls.items() if "attn2" in name)
    assert torch.allclose(cross.w(torch.ones(5)), torch.ones(5), atol=1e-6)


class XFormersAttnProcessor:
    pass


class AttnProcessor2_0:
    """Not the one of diffusers."""


def sliced(model):
    model.set_attention_slice("max")


def fused(model):
    model.fuse_qkv_projections()


def own(processor):
    return lambda model: next(m for m in model.modules() if hasattr(m, "set_processor")).set_processor(processor)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (sliced, "SlicedAttnProcessor"),
        (fused, "FusedAttnProcessor2_0"),
        (own(XFormersAttnProcessor()), "XFormersAttnProcessor"),
        (own(AttnProcessor2_0()), "AttnProcessor2_0"),
        (own(attention_processor.AttnAddedKVProcessor()), "AttnAddedKVProcessor"),
        (own(attention_processor.IPAdapterAttnProcessor2_0(8, 6)), "IPAdapterAttnProcessor2_0"),
    ],
)
def test_processors_that_hide_the_products_are_named(change, found):
    model = conditional_unet()
    change(model)
    with pytest.raises(EdadmError, match=rf"\.attentions\.0\.transformer_blocks\.0\.attn1 uses {found}"):
        QuantModel.wrap(model, Bits(4, 8))


def test_fused_projections_of_joint_attention_are_named():
    model = sd3_transformer()
    model.transformer_blocks[0].attn.fuse_projections()
    with pytest.raises(EdadmError, match=r"transformer_blocks\.0\.attn uses JointAttnProcessor2_0 with fused"):
        QuantModel.wrap(model, Bits(4, 8))


def test_a_changed_number_of_heads_without_its_scale_is_named():
    model = tiny_unet()
    attention = model.mid_block.attentions[0]
    attention.set_processor(attention_processor.AttnProcessor())
    attention.heads = 2
    with pytest.raises(EdadmError, match=r"mid_block\.attentions\.0 scales its logits by 0\.25, not by 0\.3536"):
        QuantModel.wrap(model, Bits(4, 8))


@pytest.mark.parametrize("change", [sliced, fused, lambda model: model.set_default_attn_processor()])
def test_quantized_products_cannot_be_switched_back_to_floating_point(change):
    network = QuantModel.wrap(conditional_unet(), Bits(4, 8))
    with pytest.raises((EdadmError, ValueError), match=r"quantized attention products|QuantAttention"):
        change(network.model)
    assert all(type(m.processor).__name__ == "QuantAttention" for m in network.modules() if hasattr(m, "processor"))


def test_feed_forward_in_chunks_is_named():
    model = sd3_transformer()
    model.enable_forward_chunking(1, dim=1)
    with pytest.raises(EdadmError, match=r"transformer_blocks\.0 feeds forward in chunks"):
        QuantModel.wrap(model, Bits(4, 8))
