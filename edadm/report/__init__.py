"""Tables, figures and comparisons from records; `python -m edadm.report` on the command line.

Reads records and nothing else, so a table of last year can be made again from its records.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edadm.records import Record
from edadm.report.labels import base_label
from edadm.report.table import tables

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frame", "tables"]


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return one line for each scalar metric of each record, for analyses of one's own."""
    import pandas as pd

    lines: list[dict[str, Any]] = []
    for record in records:
        shared = {
            "hash": record.hash,
            "task": record.task,
            "method": record.method,
            "label": base_label(record),
            "weight_bits": record.bits.weight,
            "act_bits": record.bits.act,
            "scope": record.scope,
            "preset": record.preset,
            "profile": record.profile,
            "seed": record.seed,
            "n_images": record.n_images,
            "status": record.status,
            "quantization_seconds": record.quantization_seconds,
            "quantization_peak_mib": record.quantization_peak_mib,
            "quantization_other_load": record.quantization_other_load,
        }
        lines += [
            shared | {"metric": name} | {key: result.get(key) for key in ("value", "n", "reason")}
            for name, result in record.metrics.items()
            if "values" not in result and not isinstance(result.get("value"), list)
        ]
    return pd.DataFrame(lines)
