"""Roles of the layers in the building blocks that families share, in the order in which they run."""

from __future__ import annotations

from edadm.quant.families.family import Roles

RESIDUAL_BLOCK: Roles = (
    (r".*\.conv1", "resnet_conv1"),
    (r".*\.time_emb_proj", "time_projection"),
    (r".*\.conv2", "resnet_conv2"),
    (r".*\.conv_shortcut", "shortcut"),
)


def attention(path: str, kind: str = "attention") -> Roles:
    """Return the roles of an attention: projections, products, output. path: pattern of its name with the dot."""
    return (
        (rf"{path}to_q", f"{kind}_q"),
        (rf"{path}to_k", f"{kind}_k"),
        (rf"{path}to_v", f"{kind}_v"),
        (rf"{path}matmul", kind),
        (rf"{path}to_out\.0", f"{kind}_out"),
    )


def joint_projections(path: str) -> Roles:
    """Return the roles of an attention of image and context tokens up to its products."""
    return (
        *attention(path)[:3],
        (rf"{path}add_q_proj", "context_q"),
        (rf"{path}add_k_proj", "context_k"),
        (rf"{path}add_v_proj", "context_v"),
        (rf"{path}matmul", "attention"),
    )


def feed_forward(path: str, kind: str = "feed_forward") -> Roles:
    """Return the roles of a feed-forward network of two layers (GELU, GEGLU and the like)."""
    return (rf"{path}net\.0\.proj", f"{kind}_in"), (rf"{path}net\.2", f"{kind}_out")


def mlp(path: str, kind: str) -> Roles:
    """Return the roles of an embedding of two layers."""
    return (rf"{path}linear_1", f"{kind}_1"), (rf"{path}linear_2", f"{kind}_2")


TRANSFORMER_BLOCK: Roles = (
    *attention(r".*\.attn1\."),
    *attention(r".*\.attn2\.", "cross_attention"),
    *feed_forward(r".*\.ff\."),
)
