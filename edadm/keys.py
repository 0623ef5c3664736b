"""What a run is made of: its parts, and the keys of its stages.

A key holds the resolved settings of the stage, the hashes of its inputs, the checkpoint's sha256, the version of each
part, and what floating-point sums depend on: chunk sizes and the number of threads. Keys are known before anything is
computed, so a run knows its hash, and what it will find finished, from the start. What cannot matter (an optimisation
without reconstruction, a learning rate of another bit width) never enters a key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edadm import expected
from edadm.config import OFF, Settings
from edadm.errors import EdadmError
from edadm.metrics import networks, references, tiny
from edadm.metrics.crops import check_crop
from edadm.metrics.images import image_files
from edadm.metrics.inception_network import RELEASE_SHA256, find_weights
from edadm.metrics.registry import INCEPTION, METRICS, PROMPTED, TINY
from edadm.parts import Key, build_guidance, build_part, build_sampler, identity
from edadm.prompts import Prompted, check_prompts, read_prompts
from edadm.quant import io
from edadm.quant.network import Bits, SitePlan
from edadm.reconstruction.settings import Joint, TwoPhase
from edadm.sampling.guidance import Guidance
from edadm.sampling.interface import DiffusionSampler
from edadm.sampling.noise import CALIBRATION, EVALUATION
from edadm.store import Store, content_hash, file_sha256
from edadm.tasks.base import Decoder, Task

VERSION = 2  # of the way the stages call the parts
ROWS_PER_PASS = 32  # calibration rows in one forward pass of the network


@dataclass(frozen=True)
class Run:
    """One run, prepared: settings, task and the place of its artefacts; parts, keys and hash follow from them."""

    settings: Settings
    task: Task
    store: Store
    device: str
    threads: int
    sweep: str | None = None

    @property
    def is_full_precision(self) -> bool:
        """Say whether the images come from the network as it is."""
        return self.bits.weight >= OFF and self.bits.act >= OFF and not (self.loaded or self.images_folder)

    @property
    def expected_band(self) -> Mapping[str, tuple[float, float]]:
        """What full precision should score, by metric: as the task says, of images and scores that are made as its."""
        return expected.band_of(self.settings, self.task)

    @property
    def loaded(self) -> Path | None:
        """The folder of a saved quantized model that is scored."""
        return _path(self.settings["load"])

    @property
    def images_folder(self) -> Path | None:
        """The folder of saved images that are scored."""
        return _path(self.settings["images"])

    @property
    def calibration_file(self) -> Path | None:
        """The file of a saved calibration set that is used."""
        return _path(self.settings["calibration_set"])

    @property
    def results(self) -> Path:
        """The results set that receives the record."""
        return Path(self.settings["results"]).expanduser().absolute()

    @property
    def references(self) -> list[Path]:
        """The results sets besides its own in which a record of the run counts as made."""
        reference = _path(self.settings["reference"])
        return [] if reference is None else [reference]

    @property
    def bits(self) -> Bits:
        """The nominal bit widths."""
        return Bits(**self.settings["bits"])

    @property
    def plan(self) -> SitePlan:
        """Which sites are quantized, from scope and preset."""
        scope = self.settings["scope"]
        return SitePlan(edge=scope["edge"], split=scope["split"], matmuls=scope["matmuls"])

    @cached_property
    def sampler(self) -> DiffusionSampler:
        """The sampler of the images. Raises EdadmError when it does not fit what the model predicts."""
        return build_sampler(self.settings["sampler"], self.task)

    @cached_property
    def calibration_sampler(self) -> DiffusionSampler:
        """The sampler of the full-precision trajectories: that of the images, unless the configuration has its own."""
        return build_sampler(self.calibration_sampling, self.task)

    @cached_property
    def guidance(self) -> Guidance | None:
        """The guidance of the images, None for an unconditional model. Raises EdadmError when that is to be guided."""
        return build_guidance(self.settings["sampler"], self.task)

    @cached_property
    def calibration_guidance(self) -> Guidance | None:
        """The guidance of the full-precision trajectories."""
        return build_guidance(self.calibration_sampling, self.task)

    @property
    def calibration_sampling(self) -> Mapping[str, Any]:
        """The part of the configuration that says how full-precision trajectories are sampled."""
        return self.settings.values.get("calibration_sampler") or self.settings["sampler"]

    @cached_property
    def calibration(self) -> Any:
        """The part that selects calibration rows."""
        return build_part(self.settings["calibration"])

    @cached_property
    def ranges(self) -> Any:
        """The part that sets ranges."""
        return build_part(self.settings["scope.ranges"])

    @cached_property
    def optimizer(self) -> Joint | TwoPhase | None:
        """The settings of the optimisation with the recipe's numbers, None where nothing is reconstructed."""
        if not self.settings.reconstructs:
            return None
        part, recipe = self.settings["optimization"], self.settings.recipe()
        numbers: Key = {"lr_weight": recipe.lr_weight, "lr_act": recipe.lr_act, "layer_loss_weight": 0.0}
        if self.settings["reconstruction.granularity"] == "fbr":
            numbers["layer_loss_weight"] = recipe.layer_loss_weight
            if "layer_loss_pass" in part:
                numbers["layer_loss_pass"] = recipe.layer_loss_pass or part["layer_loss_pass"]
        return build_part(part | numbers)

    @cached_property
    def hash(self) -> str:
        """The hash of the run: of what is shown in its row and of everything its numbers depend on."""
        settings = self.settings
        shown = {"task": self.task.name, "method": settings["method"], "profile": settings["profile.name"]}
        if not self.is_full_precision:
            shown |= {key: settings[key] for key in ("bits", "seed", "scope.name", "preset.name")}
            shown |= {"variant": dict(settings.variant)}
        return content_hash(shown | {"metrics": self.metrics_key})

    def hash_of(self, stage: str) -> str:
        """Return the hash under which the store keeps a stage of this run."""
        return content_hash(self.key(stage))

    def key(self, stage: str) -> Key:
        """Return the key of a stage: trajectories, calibration, quantized, images, evaluation, sqnr or metrics."""
        return getattr(self, f"{stage}_key")

    @cached_property
    def trajectories_key(self) -> Key:
        """Full-precision trajectories, equal for all methods and bit widths."""
        key = self._base | {
            "sampler": identity(self.calibration_sampler),
            "n": self.settings["profile.rows"],
            "batch": self.settings["chunk"],
            "seed": self.settings["seed"],
            "feature": self.feature,
        }
        if self.feature_batches is not None:
            key |= {"feature_batches": self.feature_batches}
        return key | _guidance_key(self.calibration_guidance, CALIBRATION)

    @property
    def feature(self) -> str:
        """The module whose output TDAC reads."""
        named: str = self.settings["preset.tdac.feature"]
        return named if self.task.own is None else self.task.own.features.get(named, named)

    @property
    def feature_batches(self) -> int | None:
        """The first batches of trajectories whose features TDAC sees, None for all."""
        return self.settings["recipe"].get("tdac", {}).get("feature_batches")

    @cached_property
    def calibration_key(self) -> Key:
        """Calibration rows, equal for all bit widths."""
        if self.calibration_file:
            return {"stages": VERSION, "file": file_sha256(self.calibration_file)}
        return {
            "stages": VERSION,
            "trajectories": self.hash_of("trajectories"),
            "calibration": identity(self.calibration),
            "rows": self.settings["profile.rows"],
            "seed": self.settings["seed"],
        }

    @cached_property
    def quantized_key(self) -> Key:
        """The quantized network."""
        if self.loaded:
            return {"stages": VERSION, "loaded": [file_sha256(path) for path in io.files(self.loaded)]}
        key = self._base | {
            "calibration": self.hash_of("calibration"),
            "bits": dataclasses.asdict(self.bits),
            "plan": {name: self.settings[f"scope.{name}"] for name in ("edge", "split", "matmuls")},
            "ranges": identity(self.ranges),
            "range_batches": self.settings["profile.range_batches"],
        }
        if self.optimizer is None:
            return key
        return key | {
            "granularity": self.settings["reconstruction.granularity"],
            "optimization": identity(self.optimizer),
            "rows_per_pass": ROWS_PER_PASS,
            "seed": self.settings["seed"],
        }

    @cached_property
    def images_key(self) -> Key:
        """The images that are scored."""
        if self.images_folder:
            return {"stages": VERSION, "images": _folder_sha256(self.images_folder), "n": self.settings["n_images"]}
        return self._base | {
            "quantized": None if self.is_full_precision else self.hash_of("quantized"),
            "sampler": identity(self.sampler),
            "n": self.settings["n_images"],
            "chunk": self.settings["chunk"],
            "precision": self.settings["precision"],
            "seed": self.settings["evaluation_seed"],
            **_guidance_key(self.guidance, EVALUATION),
            **_decoder_key(self.task.decoder),
        }

    @cached_property
    def evaluation_key(self) -> Key:
        """The full-precision trajectories on which the error of every step is measured."""
        return self._base | {
            "sampler": identity(self.sampler),
            "n": self.settings["metrics.sqnr_rows"],
            "chunk": self.settings["chunk"],
            "seed": self.settings["evaluation_seed"],
            **_guidance_key(self.guidance, EVALUATION),
        }

    @cached_property
    def sqnr_key(self) -> Key:
        """The error of the noise prediction at every step."""
        return {"evaluation": self.hash_of("evaluation"), "quantized": self.hash_of("quantized")}

    @cached_property
    def metrics_key(self) -> Key:
        """The scores."""
        return self.protocol | {
            "images": self.hash_of("images"),
            "sqnr": self.hash_of("sqnr") if self.compares_steps else None,
            "metrics": {name: METRICS[name].version for name in self.metrics},
            "bootstrap": self.settings["metrics.bootstrap"],
        }

    @cached_property
    def protocol(self) -> Key:
        """What two numbers must share to be compared: sampler, noise, checkpoint and references."""
        return {
            "sampler": identity(self.sampler),
            "evaluation_seed": self.settings["evaluation_seed"],
            "chunk": self.settings["chunk"],
            **({"sqnr_rows": self.settings["metrics.sqnr_rows"]} if "sqnr" in self.metrics else {}),
            "checkpoint": self.task.sha256(),
            "shape": self.task.sample_shape,
            **_guidance_key(self.guidance, EVALUATION),
            **({"tiny": self._tiny_identity()} if self.needs_tiny else {}),
            **({"inception": self._inception_identity()} if self.needs_inception else {}),
            **({"crop": self.crop} if self.crop else {}),
            **networks.identities(self.settings["metrics"], self.metrics, self.prompts),
        }

    @cached_property
    def metrics(self) -> list[str]:
        """The names of the metrics. Raises EdadmError for an unknown one."""
        names = self.settings["metrics.names"]
        unknown = [name for name in names if name not in METRICS]
        if unknown:
            raise EdadmError(f"metrics.names has {', '.join(unknown)}: choose from {', '.join(METRICS)}")
        return names

    @property
    def needs_tiny(self) -> bool:
        """Say whether a metric uses the embedded features."""
        return any(name in TINY for name in self.metrics)

    @property
    def needs_inception(self) -> bool:
        """Say whether a metric uses Inception features."""
        return any(name in INCEPTION for name in self.metrics)

    @property
    def crop(self) -> str | None:
        """The centre crop and resize of reference and scored images. Raises EdadmError for an unknown name."""
        name: str | None = self.settings["metrics.crop"]
        check_crop(name)
        return name

    @cached_property
    def prompts(self) -> list[str] | None:
        """The prompts of the scored images by number, None where no metric needs them.

        They come from the file ``metrics.clip.prompts`` (of clip_tiny: ``metrics.clip_tiny.prompts``), else from the
        task. Raises EdadmError when neither has them and when the file has not one for each image.
        """
        asking = next((name for name in PROMPTED if name in self.metrics), None)
        if asking is None:
            return None
        count, path = self.settings["n_images"], networks.section(self.settings["metrics"], asking)["prompts"]
        if path is None:
            conditions = self.guidance.conditions if self.guidance and not self.images_folder else None
            if not isinstance(conditions, Prompted):
                raise EdadmError(
                    f"the images of task {self.task.name} have no prompts of their own: give metrics.{asking}.prompts, "
                    "a text file whose line i belongs to image i"
                )
            return conditions.prompts(EVALUATION, self.settings["evaluation_seed"], range(count))
        prompts = read_prompts(path)
        if self.images_folder:
            check_prompts(prompts, len(image_files(self.images_folder)), str(path))
        else:
            check_prompts(prompts[:count], count, str(path))
        return prompts[:count]

    def _tiny_identity(self) -> Key:
        for path in (tiny.WEIGHTS, self.tiny_reference):
            if not path.is_file():
                raise EdadmError(f"{path} is missing: reinstall edadm, or choose metrics without the embedded proxies")
        return {"features": file_sha256(tiny.WEIGHTS), "reference": file_sha256(self.tiny_reference)}

    def _inception_identity(self) -> Key:
        part = self.settings["metrics.inception"]
        source = part["reference"]
        if source is None:
            raise EdadmError(
                "metrics.inception.reference is not set: give a folder of images, an .npz, or cifar10-train"
            )
        content = references.content_of(source, self.crop)
        return {"weights": find_weights(part["weights"], part["sha256"] or RELEASE_SHA256)[1], "reference": content}

    @property
    def has_network(self) -> bool:
        """Say whether there is a quantized network whose noise predictions can be compared."""
        return not (self.is_full_precision or self.images_folder)

    @property
    def compares_steps(self) -> bool:
        """Say whether noise predictions are compared at every step."""
        return self.has_network and "sqnr" in self.metrics

    @property
    def tiny_reference(self) -> Path:
        """The file with the reference statistics of the embedded proxies."""
        return _path(self.settings["metrics.reference"]) or tiny.REFERENCE

    @cached_property
    def _base(self) -> Key:
        key = {"stages": VERSION, "model": self.task.sha256(), "shape": self.task.sample_shape, "threads": self.threads}
        return key | ({"tf32": True} if self.settings["tf32"] else {})


def _guidance_key(guidance: Guidance | None, stream: str) -> Key:
    return {} if guidance is None else {"guidance": guidance.identity(stream)}


def _decoder_key(decoder: Decoder | None) -> Key:
    if decoder is None:
        return {}
    to_bytes = getattr(decoder, "to_bytes", None)  # of decoders that can round or cut
    choice = {} if to_bytes is None else {"to_bytes": to_bytes.__name__}
    return {"decoder": {"part": type(decoder).__name__, "version": decoder.version, **choice}}


def _path(value: str | None) -> Path | None:
    return Path(value).expanduser().absolute() if value else None


def _folder_sha256(folder: Path) -> str:
    if not folder.is_dir():
        raise EdadmError(f"{folder} is no folder")
    return content_hash({path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()})
