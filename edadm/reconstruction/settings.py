"""How units are optimised: EDA-DM's joint phase, and the two phases of AdaRound, BRECQ and Q-Diffusion."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Protocol

from edadm.errors import EdadmError

EXCLUDED_LAYERS = ("registration", "main_path")
LAYER_LOSS_PASSES = ("separate", "shared")


@dataclass(frozen=True)
class Phase:
    """One optimisation of one unit: what is trained, on which inputs, for which loss.

    activations: whether activations are quantized. lr_weight, lr_act: learning rates of the rounding variables and of
    the activation scales, None where they are not trained; the second always falls to 0 as a cosine.
    quantized_prefix: whether temb and context come from the quantized network; if not, the main input does not either.
    input_prob: share of the elements of the main input that come from the quantized network.
    drop_prob: probability that an element inside the unit is left unquantized (QDrop).
    edges: whether a value on a bound of its grid passes the gradient, see `edadm.quant.quantizer.quantize_ste`.
    """

    name: str
    _: KW_ONLY
    iterations: int
    batch: int
    activations: bool = True
    lr_weight: float | None = None
    lr_act: float | None = None
    cosine_weight: bool = True
    quantized_prefix: bool = True
    input_prob: float = 1.0
    drop_prob: float = 0.0
    p: float = 2.0
    reg_weight: float = 0.0
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2
    layer_loss_weight: float = 0.0
    layer_loss_pass: str = "shared"
    excluded_layer: str = "main_path"
    edges: bool = False

    def __post_init__(self) -> None:
        _one_of("layer_loss_pass", self.layer_loss_pass, LAYER_LOSS_PASSES)
        _one_of("excluded_layer", self.excluded_layer, EXCLUDED_LAYERS)
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise EdadmError(f"{name} of phase {self.name} is {getattr(self, name)}: it must be at least 1")
        _shares(input_prob=self.input_prob, drop_prob=self.drop_prob, warmup=self.warmup)


class Optimization(Protocol):
    """What a reconstruction asks of an optimisation."""

    def phases(self, kind: str = "block") -> tuple[Phase, ...]:
        """Return the phases for a unit of this kind (block, layer or matmul), as many for every kind."""


@dataclass(frozen=True)
class Joint:
    """Rounding and activation scales together, with QDrop (EDA-DM, methods.md 3.4).

    layer_loss_weight: lambda_2 of the layer losses, used by granularity fbr. input_prob: probability of the
    quantized-prefix value per element of the main input; at 1 blocks read the full-precision input and single layers
    the quantized-prefix one, as the official code does (golden README 9.2, 9.10).
    excluded_layer: leave the last registered layer out of the layer losses, or the one that ends the main path.
    layer_loss_pass: layer losses from a second forward pass with masks of its own (official), or from the first.
    reg_weight: weight of the rounding regulariser, which the official code switches off.
    """

    iterations: int
    _: KW_ONLY
    lr_weight: float
    lr_act: float
    batch: int = 32
    layer_loss_weight: float = 0.8
    layer_loss_pass: str = "separate"
    excluded_layer: str = "registration"
    input_prob: float = 0.5
    drop_prob: float = 0.5
    p: float = 2.0
    reg_weight: float = 0.0
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2
    edges: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        _shares(input_prob=self.input_prob)

    def phases(self, kind: str = "block") -> tuple[Phase, ...]:
        """Return the single phase for a unit of this kind (block, layer or matmul)."""
        reads_full_precision = self.input_prob >= 1 and kind == "block"
        return (
            Phase(
                "joint",
                iterations=self.iterations,
                batch=self.batch,
                lr_weight=self.lr_weight,
                lr_act=self.lr_act,
                input_prob=0.0 if reads_full_precision else self.input_prob,
                drop_prob=self.drop_prob,
                p=self.p,
                reg_weight=self.reg_weight,
                beta_start=self.beta_start,
                beta_end=self.beta_end,
                warmup=self.warmup,
                layer_loss_weight=self.layer_loss_weight,
                layer_loss_pass=self.layer_loss_pass,
                excluded_layer=self.excluded_layer,
                edges=self.edges,
            ),
        )


@dataclass(frozen=True)
class TwoPhase:
    """First the rounding of all units with float activations, then all activation scales (methods.md 3.2, 3.3).

    Phase "weights" reads inputs of the weight-quantized network, phase "activations" full-precision inputs.
    layer_loss_weight: as in ``Joint``; it adds layer losses to both phases under granularity fbr.
    """

    iterations_weight: int
    iterations_act: int
    _: KW_ONLY
    lr_weight: float = 1e-3
    lr_act: float = 4e-4
    batch: int = 32
    p_weight: float = 2.0
    p_act: float = 2.4
    reg_weight: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2
    layer_loss_weight: float = 0.8
    excluded_layer: str = "registration"
    edges: bool = False
    version: int = 1

    def phases(self, kind: str = "block") -> tuple[Phase, ...]:
        """Return the phases for a unit of this kind: weights, then activations."""
        weights = Phase(
            "weights",
            iterations=self.iterations_weight,
            batch=self.batch,
            activations=False,
            lr_weight=self.lr_weight,
            cosine_weight=False,
            p=self.p_weight,
            reg_weight=self.reg_weight,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            warmup=self.warmup,
            layer_loss_weight=self.layer_loss_weight,
            excluded_layer=self.excluded_layer,
            edges=self.edges,
        )
        activations = Phase(
            "activations",
            iterations=self.iterations_act,
            batch=self.batch,
            lr_act=self.lr_act,
            quantized_prefix=False,
            input_prob=0.0,
            p=self.p_act,
            layer_loss_weight=self.layer_loss_weight,
            excluded_layer=self.excluded_layer,
            edges=self.edges,
        )
        return weights, activations


def _shares(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise EdadmError(f"{name} is {value}: it is a share, from 0 to 1")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise EdadmError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
