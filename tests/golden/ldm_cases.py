"""Read the golden vectors of latent diffusion and DiT: ``ldm/index.json`` lists one folder per case."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import golden_root
from tests.golden.cases import COMMITTED


@dataclass(frozen=True)
class Case:
    """One folder. weights: under the original names, float32 where floating; empty where the case has none."""

    config: dict[str, Any]
    io: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    key_map: dict[str, list[list[str]]]

    @property
    def tolerance(self) -> dict[str, float]:
        return self.config["tolerance"]


def root() -> Path:
    return golden_root().resolve() / "ldm"


def names(*kinds: str) -> list[Any]:
    """The cases of these kinds for ``pytest.mark.parametrize``, or one that is skipped where there is none."""
    index = root() / "index.json"
    listed = json.loads(index.read_text())["cases"] if index.is_file() else []
    found = [name for name in listed if _config(name)["kind"] in kinds]
    if found or (index.is_file() and COMMITTED not in index.parents):
        return found
    reason = f"no {' or '.join(kinds)} among the committed vectors: set EDADM_GOLDEN to the full set"
    return [pytest.param("none", marks=pytest.mark.skip(reason=reason))]


@lru_cache(maxsize=2)  # tests of one case follow each other
def load(name: str) -> Case:
    folder = root() / name
    stored = folder / "weights.safetensors"
    if stored.is_file():
        tensors = {key: t.float() if t.is_floating_point() else t for key, t in load_file(stored).items()}
    else:
        rule = folder / "weights_rule.json"
        tensors = synthesised(json.loads(rule.read_text())) if rule.is_file() else {}
    key_map = folder / "key_map.json"
    return Case(
        config=_config(name),
        io=load_file(folder / "io.safetensors"),
        weights=tensors,
        key_map=json.loads(key_map.read_text()) if key_map.is_file() else {},
    )


def _config(name: str) -> dict[str, Any]:
    return json.loads((root() / name / "config.json").read_text())


def synthesised(rule: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights from a seed and a rule per tensor (golden README, ldm, 2.1)."""
    return {
        name: tensor(name, rule["seed"], entry["shape"], entry["K"], entry["e"], entry["base"])
        for name, entry in rule["tensors"].items()
    }


def tensor(name: str, seed: int, shape: list[int], top: int, exponent: int, base: float) -> torch.Tensor:
    with np.errstate(over="ignore"):
        start = _mix(np.array([crc32(name.encode()) + (seed << 32)], dtype=np.uint64))
        u = _mix(start + np.arange(int(np.prod(shape)), dtype=np.uint64)) >> np.uint64(11)
    k = (u % np.uint64(2 * top + 1)).astype(np.int64) - top
    return torch.from_numpy((base + k * 2.0**-exponent).astype(np.float32)).reshape(shape)


def _mix(v: np.ndarray) -> np.ndarray:
    """One step of splitmix64."""
    v = v + np.uint64(0x9E3779B97F4A7C15)
    v = (v ^ (v >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    v = (v ^ (v >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return v ^ (v >> np.uint64(31))


def assert_key_map(case: Case, module: torch.nn.Module, prefix: str = "") -> None:
    """Check that every tensor of ``module`` is what key_map.json says of an original tensor, bit by bit.

    prefix: of the original keys that the map must cover whole.
    """
    if not case.key_map and COMMITTED in root().parents:
        pytest.skip("no key_map.json among the committed vectors: set EDADM_GOLDEN to the full set")
    assert set(case.key_map) == {key for key in case.weights if key.startswith(prefix)}
    converted = module.state_dict()
    expected = {name: _operation(op, case.weights[key]) for key, pairs in case.key_map.items() for name, op in pairs}
    assert set(converted) == set(expected)
    for name, value in expected.items():
        assert torch.equal(converted[name], value), name


def _operation(op: str, tensor: torch.Tensor) -> torch.Tensor:
    """The operations of golden README, ldm, 4.1."""
    words = op.split()
    if words[0] == "copy":
        return tensor
    if words[0] == "drop_trailing_1":
        return tensor.reshape([size for i, size in enumerate(tensor.shape) if i < 2 or size != 1])
    if words[0].startswith("third_"):
        return tensor.chunk(3)["qkv".index(words[0][-1])]
    assert words[0] == "qkv_per_head", op
    options = dict(word.split("=") for word in words[1:])
    channels = tensor.shape[0] // 3
    heads = tensor.reshape(int(options["heads"]), 3, channels // int(options["heads"]), -1)
    part = heads[:, "qkv".index(options["part"])].reshape(channels, -1)
    return part if tensor.ndim > 1 else part.flatten()


def assert_config(case_config: dict[str, Any], model: Any) -> None:
    """Check the fields of a stored diffusers config against a model's; tuples count as lists."""
    assert type(model).__name__ == case_config["class"]
    for field, value in case_config["config"].items():
        actual = model.config[field]
        actual = list(actual) if isinstance(actual, tuple) else actual
        assert actual == (pytest.approx(value) if isinstance(value, float) else value), field


def compare(case: Case, computed: dict[str, torch.Tensor], precision: int) -> set[str]:
    """Check computed tensors, named without their precision, against those stored; return the names compared."""
    compared = {f"{name}_f{precision}" for name in computed} & set(case.io)
    for name in compared:
        error = (computed[name.removesuffix(f"_f{precision}")] - case.io[name]).abs().max().item()
        assert error <= case.tolerance[f"f{precision}_abs"], f"{name} is off by {error:.3g}"
    return compared
