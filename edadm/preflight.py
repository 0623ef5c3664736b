"""What a run would fail at hours later, found before anything long starts.

What the configuration and the files say by themselves is checked as a run is prepared (`edadm.experiment.prepare`);
here is what needs a decoder, an image or the rows of a calibration set. Whether the network takes its samples shows
when it is timed (`edadm.estimate`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from edadm import stages
from edadm.calibration.rows import CalibrationSet
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.metrics import crops, images, references, tiny
from edadm.sampling.guidance import ClassConditions, Guidance
from edadm.sampling.noise import CALIBRATION
from edadm.tasks.checkpoint_file import require_whole

logger = logging.getLogger(__name__)

INCEPTION_FEATURES = 2048


def check(run: Run) -> None:
    """Raise EdadmError when a run cannot end with a record; takes seconds."""
    if run.loaded:
        for file in run.loaded.glob("*.safetensors"):
            require_whole(file)
    if run.calibration_file and run.has_network:
        check_rows(run)
    if run.is_full_precision or run.images_folder:
        check_images(run, size_of_images(run))


def size_of_images(run: Run) -> tuple[int, int]:
    """Return height and width of the images of a run, where it can be from images that exist.

    Raises EdadmError when its decoder cannot make any.
    """
    if run.images_folder:
        _, height, width = images.image_size(images.image_files(run.images_folder)[0])
        return height, width
    made = run.store.find("images", run.key("images"))
    if made is None:
        return decoded_size(run)
    _, _, height, width = images.read_file(made / stages.IMAGES).shape
    return height, width


def decoded_size(run: Run) -> tuple[int, int]:
    """Return height and width of the images of a run. Raises EdadmError when its decoder cannot make any."""
    shape = run.task.sample_shape
    to_images = run.task.to_images(run.device)
    try:
        decoded = to_images(torch.zeros(1, *shape, device=run.device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise EdadmError(
            f"the decoder of task {run.task.name} makes no image of a sample of {list(shape)} "
            f"({str(error).splitlines()[0]}): is it that of another model? Else set model.sample_shape"
        ) from error
    return decoded.shape[2], decoded.shape[3]


def check_images(run: Run, size: tuple[int, int]) -> None:
    """Raise EdadmError when images of this height and width cannot be scored by the metrics of a run."""
    if run.needs_tiny:
        tiny.load_reference(run.tiny_reference)
        if size != (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE):
            raise EdadmError(
                f"the images of task {run.task.name} are {size[1]} x {size[0]}, the embedded proxies take "
                f"{tiny.IMAGE_SIZE} x {tiny.IMAGE_SIZE}: choose other metrics, such as metrics=inception"
            )
    if run.crop is not None:
        cropped = crops.crop(torch.zeros(3, *size, dtype=torch.uint8), run.crop)
        size = (cropped.shape[1], cropped.shape[2])
    for source, features in _sources(run):
        references.check(source, run.crop, size, features)


def _sources(run: Run) -> Iterator[tuple[str, int | None]]:
    """Yield the references of the metrics of a run and the number of features compared, None where it varies."""
    settings = run.settings["metrics"]
    if run.needs_inception:
        yield settings["inception"]["reference"], INCEPTION_FEATURES
    if "fd_dinov2" in run.metrics:
        yield settings["dinov2"]["reference"], None


def check_rows(run: Run) -> None:
    """Raise EdadmError when the conditions of a saved calibration set are not those that the network takes."""
    assert run.calibration_file is not None
    rows, _ = CalibrationSet.load(run.calibration_file)
    given = {name: tuple(tensor.shape[1:]) for name, tensor in (rows.condition or {}).items()}
    guidance = run.calibration_guidance
    example = {} if guidance is None else guidance.conditions.rows(CALIBRATION, run.settings["seed"], [0])
    wanted = {name: tuple(tensor.shape[1:]) for name, tensor in example.items()}
    if given != wanted:
        raise EdadmError(
            f"{run.calibration_file} holds rows with the condition {_words(given)}, task {run.task.name} takes "
            f"{_words(wanted)}: use a set made for this task"
        )
    most = _largest_label(guidance)
    labels = (rows.condition or {}).get("class_labels")
    if most is not None and labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) <= most:
        raise EdadmError(
            f"{run.calibration_file} holds class labels from {int(labels.min())} to {int(labels.max())}, the labels of "
            f"task {run.task.name} are 0 to {most}: use a set made for this task"
        )
    if guidance is not None and guidance.guides != (rows.null is not None):
        logger.warning(
            "%s was saved %s guidance, the images are sampled %s it: the network is calibrated on other rows than it "
            "will see",
            run.calibration_file, *(("with", "without") if rows.null is not None else ("without", "with")),
        )  # fmt: skip


def _largest_label(guidance: Guidance | None) -> int | None:
    conditions = None if guidance is None else getattr(guidance.conditions, "own", guidance.conditions)
    if not isinstance(conditions, ClassConditions):
        return None
    return max(conditions.classes - 1, conditions.null_label or 0)


def _words(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" if shape else name for name, shape in shapes.items()) or "none"
