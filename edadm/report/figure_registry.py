"""The figures by name; each is drawn from records and diagnostics into a folder, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from edadm.diagnostics.files import Diagnostic
from edadm.records import Record
from edadm.report.figures import sqnr
from edadm.report.figures_activation import fig3
from edadm.report.figures_calibration import fig5, fig11
from edadm.report.figures_reconstruction import fig4, soft_rounding
from edadm.report.paper_figures import fig10, samples

Draw = Callable[[Sequence[Record], Sequence[Diagnostic], Path], list[Path]]

FIGURES: dict[str, Draw] = {
    "fig3": fig3,
    "fig4": fig4,
    "fig5": fig5,
    "fig10": fig10,
    "fig11": fig11,
    "fig7": partial(samples, name="fig7_imagenet_samples"),
    "fig8": partial(samples, name="fig8_coco_samples"),
    "fig9": partial(samples, name="fig9_drawbench_samples"),
    "soft_rounding": soft_rounding,
    "sqnr": sqnr,
}
