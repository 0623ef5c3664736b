"""From the scheduler_config.json of a diffusers pipeline to a sampler that makes the same samples."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from edadm.errors import EdadmError
from edadm.sampling.flow import FlowEuler, dynamic_shift, shifted
from edadm.sampling.interface import DiffusionSampler
from edadm.sampling.scheduler import STEPS, SchedulerSampler

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SCHEDULERS = (*STEPS, FLOW_SCHEDULER)
REMEDY = "choose a sampler of ours with sampler=... (python run.py --help lists them)"

# Options that are reproduced at these values only; all others are at any value, since the scheduler itself steps.
_LIMITS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
        "thresholding": (False,),
    },
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "dpmsolver"),  # the others draw noise
        "variance_type": (None,),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
    },
    "UniPCMultistepScheduler": {"solver_p": (None,), "use_flow_sigmas": (False,), "use_dynamic_shifting": (False,)},
    "EulerDiscreteScheduler": {"timestep_type": ("discrete",)},
    FLOW_SCHEDULER: {
        "stochastic_sampling": (False,),
        "invert_sigmas": (False,),
        "shift_terminal": (None,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
    },
}
# Pipelines that make another scheduler of the one they are given, or set options of it, as they are built.
_ITS_SCHEDULER = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
_SET_OPTIONS = {"StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False}}
_OF_EARLY_VERSIONS = {"predict_epsilon": True, "tensor_format": "pt"}  # what these said holds by itself
_TIME_SCALES = {"SD3Transformer2DModel": 1000.0, "FluxTransformer2DModel": 1.0}  # of the pipelines' network calls


def sampler_of(
    config: Mapping[str, Any],
    steps: int,
    eta: float = 0.0,
    *,
    pipeline: str | None = None,
    denoiser: str | None = None,
    tokens: int | None = None,
) -> DiffusionSampler:
    """Return the sampler that makes the samples of a pipeline with this scheduler_config.json, in so many steps.

    eta: of DDIM. pipeline: its class, since some change the scheduler that they are given. denoiser: the class of the
    network, for schedulers of flows, whose noise levels and times the pipelines of SD3 and Flux choose differently.
    tokens: patches of an image, for noise levels shifted by its size.
    Raises EdadmError for a scheduler or an option whose samples are not reproduced, naming it and what is.
    """
    name = _ITS_SCHEDULER.get(pipeline or "", config.get("_class_name"))
    if name not in SCHEDULERS:
        raise EdadmError(f"the pipeline's scheduler is {name}, reproduced are {', '.join(SCHEDULERS)}: {REMEDY}")
    if eta and name != "DDIMScheduler":
        raise EdadmError(f"eta is {eta:g}, which only DDIM has, the pipeline's scheduler is {name}: set it to 0")
    options = _options(name, config)
    if pipeline in _SET_OPTIONS:
        options |= {option: value for option, value in _SET_OPTIONS[pipeline].items() if option in options}
    for option, values in _LIMITS.get(name, {}).items():
        if options[option] not in values:
            supported = " or ".join(map(str, values))
            raise EdadmError(f"{name} with {option}={options[option]} is not reproduced, only {supported}: {REMEDY}")
    if name == FLOW_SCHEDULER:
        return _flow(options, steps, denoiser, tokens)
    prediction_type = options.pop("prediction_type")
    if prediction_type not in SchedulerSampler.predictions:
        supported = ", ".join(SchedulerSampler.predictions)
        raise EdadmError(f"{name} with prediction_type={prediction_type} is not reproduced, only {supported}: {REMEDY}")
    stated = {option: value for option, value in options.items() if value is not None and not _is_infinite(value)}
    return SchedulerSampler(name, steps, stated, eta, prediction_type)


def _options(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option of the scheduler with its value, which is the class's own where the config has none.

    Options of another scheduler are left out as diffusers does; what no scheduler has is an error.
    """
    import diffusers

    scheduler_class = getattr(diffusers, name)
    own = _names(scheduler_class)
    known = own.union(*(_names(getattr(diffusers, other)) for other in SCHEDULERS))
    given = {option: value for option, value in config.items() if not option.startswith("_")}
    for option, value in given.items():
        harmless = value in (None, False) or _OF_EARLY_VERSIONS.get(option) == value
        if option not in known and not harmless:
            raise EdadmError(f"{name} has no option {option} in this version of diffusers ({option}={value}): {REMEDY}")
    try:
        resolved = scheduler_class(**{option: value for option, value in given.items() if option in own}).config
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise EdadmError(f"diffusers cannot build the {name} of this configuration ({error}): {REMEDY}") from error
    return {option: resolved[option] for option in sorted(own)}


def _names(scheduler_class: type) -> set[str]:
    return set(inspect.signature(scheduler_class).parameters)


def _is_infinite(value: Any) -> bool:
    """Say whether a value is the infinity that stands for no limit, which a key cannot hold."""
    return isinstance(value, float) and math.isinf(value)


def _flow(options: Mapping[str, Any], steps: int, denoiser: str | None, tokens: int | None) -> FlowEuler:
    if denoiser not in _TIME_SCALES:
        raise EdadmError(
            f"{FLOW_SCHEDULER} is reproduced for {' and '.join(_TIME_SCALES)}, whose pipelines choose noise levels and "
            f"times of their own, and this is a {denoiser}: give sampler=flow_euler with shift, last_sigma and "
            "time_scale"
        )
    smallest = 1 / options["num_train_timesteps"]
    if not options["use_dynamic_shifting"]:
        shift = options["shift"]
        smallest = float(shifted(smallest, shift))
    elif tokens is None:
        raise EdadmError(f"{FLOW_SCHEDULER} with use_dynamic_shifting depends on the image size: give its tokens")
    else:
        ends = (options["base_shift"], options["max_shift"], options["base_image_seq_len"])
        shift = dynamic_shift(tokens, *ends, options["max_image_seq_len"])
        shift = math.log(shift) if options["time_shift_type"] == "linear" else shift
    time_scale = _TIME_SCALES[denoiser]
    return FlowEuler(steps, shift, smallest if denoiser.startswith("SD3") else None, time_scale)
