"""From the composed Hydra configuration to typed settings: checks, the recipe, and what a hash may depend on.

``DictConfig`` ends here; the stages of ``edadm.experiment`` take the dataclasses of this file or plain values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edadm.checkout import root
from edadm.errors import EdadmError

CONF = Path(__file__).resolve().parent.parent / "conf"
SLOTS = ("calibration", "transform", "ranges", "reconstruction", "optimization", "activation_sets", "correction")
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
WHOLE_NUMBERS = {
    "n_images": 0, "chunk": 1, "seed": 0, "evaluation_seed": 0, "metrics.sqnr_rows": 1,
    "metrics.bootstrap": 1, "profile.rows": 1, "profile.batch": 1, "profile.iterations": 1, "profile.range_batches": 1,
}  # fmt: skip
OFF = 16  # bits from which a tensor stays in floating point
OmegaConf.register_new_resolver("share", lambda total, share: max(1, round(total * share)), replace=True)
OmegaConf.register_new_resolver("available", lambda group, *names: available(group, names), replace=True)

PRECISIONS = ("fp32", "bf16", "fp16")
CACHES = ("auto", "device", "host", "disk")
WORDS_OF_SAMPLER = ("name", "_target_", "spacing", "beta_schedule")  # all other settings of one are numbers
PROFILE_NUMBERS = ("rows", "batch", "iterations")
CACHE = ("reconstruction", "cache")  # where tensors lie in the meantime changes no result
NO_PART_OF_A_RUN = ("experiments", "experiment", "scale")  # an experiment chooses runs and changes none
RECIPE_NUMBERS = ("lr_weight", "lr_act", "layer_loss_weight", "layer_loss_pass")


@dataclass(frozen=True)
class Recipe:
    """Learning rates and loss weights of one (task, granularity, optimization, profile, bits of the weights)."""

    lr_weight: float
    lr_act: float
    layer_loss_weight: float
    layer_loss_pass: str | None


@dataclass(frozen=True)
class Settings:
    """One run: its resolved configuration as plain values, and the words that compose it again."""

    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    variant: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Return one entry of the configuration by its dotted name."""
        value: Any = self.values
        for part in name.split("."):
            value = value[part]
        return value

    @property
    def bits_name(self) -> str:
        """Return the bits as ``w4a8``, also where no file has that name."""
        return f"w{self['bits.weight']}a{self['bits.act']}"

    @property
    def label(self) -> str:
        """Return the method and what differs from it, for log lines and progress bars."""
        extra = " ".join(f"{key}={value}" for key, value in self.variant.items())
        return f"{self['method']}{f' ({extra})' if extra else ''} {self.bits_name} seed {self['seed']}"

    @property
    def reconstructs(self) -> bool:
        """Say whether anything is optimised after the ranges are set."""
        return self["reconstruction.granularity"] is not None

    def recipe(self) -> Recipe:
        """Return the recipe of this run. Raises EdadmError when the task has none for it."""
        return pick_recipe(
            self["recipe"],
            self["reconstruction.name"],
            self["optimization.name"],
            self["profile.name"],
            self["bits.weight"],
        )


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose ``conf/config.yaml`` with command-line words, inside a Hydra job or outside of one."""
    return copy.deepcopy(_compose(CONF, tuple(overrides)))


def offer_experiments() -> None:
    """Make ``experiments/*.yaml`` a group of Hydra beside those of ``conf``.

    Not through ``hydra.searchpath``: with the checkout on it, every folder there is a group, and ``results=FOLDER``
    would choose from the group ``results``.
    """
    _offer(root() / "experiments")


@lru_cache
def _offer(folder: Path) -> None:
    from hydra.core.config_store import ConfigStore

    for path in sorted(folder.glob("*.yaml")):
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        content["experiment"].pop("blocks", None)  # the rows: many, and no business of Hydra's
        ConfigStore.instance().store(path.stem, content, "experiments", "_global_", str(path))


@lru_cache(maxsize=64)
def _compose(conf: Path, overrides: tuple[str, ...]) -> DictConfig:
    import hydra

    offer_experiments()
    if _is_in_our_job():
        return hydra.compose("config", list(overrides))
    with _without_other_job(), hydra.initialize_config_dir(str(conf), version_base="1.3"):
        return hydra.compose("config", list(overrides))


def _is_in_our_job() -> bool:
    """Say whether Hydra composes from ``conf``, and not from the configuration of an application that calls ours."""
    from hydra.core.global_hydra import GlobalHydra

    state = GlobalHydra.instance()
    if not state.is_initialized():
        return False
    places = (element.path for element in state.config_loader().get_search_path().get_path())
    return any(Path(place.removeprefix("file://")).resolve() == CONF for place in places if place)


@contextmanager
def _without_other_job() -> Iterator[None]:
    """Set aside what the calling application has initialised Hydra with."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import VersionBase

    job, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = job
        VersionBase.instance().version_base = base


def options(group: str) -> list[str]:
    """Return the names that a group of ``conf`` offers."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def available(group: str, names: Sequence[str]) -> str:
    """Return those of some names that a group of ``conf`` offers, as an axis of a sweep. Raises EdadmError if none."""
    offered = options(group)
    found = [name for name in dict.fromkeys(names) if name in offered]
    if not found:
        raise EdadmError(f"not available yet: {', '.join(f'{group} {name}' for name in dict.fromkeys(names))}")
    return ",".join(found)


def words_of_run(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without those that choose an experiment: the run is the same without it."""
    return [word for word in words if word.lstrip("+").split("=", 1)[0] not in NO_PART_OF_A_RUN]


def settings(config: DictConfig, overrides: Sequence[str] = ()) -> Settings:
    """Return the checked settings of a composed configuration.

    overrides: the words of the command line that composed it; they tell which parts differ from the method's own.
    Raises EdadmError naming the value that is impossible and the choices.
    """
    overrides = words_of_run(overrides)
    values = _plain(with_task_of_pair(config, overrides))
    check(values)
    result = Settings(values, tuple(overrides), variant(values))
    if result.reconstructs and not (values["load"] or values["images"]):
        result.recipe()
    return result


def _plain(config: DictConfig) -> dict[str, Any]:
    if config.scope.name == "published" and config.published is None:
        raise EdadmError(
            f"method {config.method} has no published scope for diffusion models: use scope=full, "
            f"or one of the methods with one ({', '.join(_methods_with_published_scope())})"
        )
    if config.scope.name == "published" and config.task.name not in config.published.get("tasks", [config.task.name]):
        raise EdadmError(
            f"the published scope of method {config.method} is that of its command for "
            f"{', '.join(config.published.tasks)}: use scope=full for task {config.task.name}"
        )
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise EdadmError(f"the configuration does not resolve: {error}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key not in NO_PART_OF_A_RUN}


def _methods_with_published_scope() -> Iterator[str]:
    for name in options("method"):
        if OmegaConf.select(OmegaConf.load(CONF / "method" / f"{name}.yaml"), "published") is not None:
            yield name


def with_task_of_pair(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of the task that model and dataset belong to.

    Named on the command line without a task, they would otherwise meet the default task's sampler and recipe.
    Raises Skipped when no task has the pair.
    """
    named = {word.lstrip("+").split("=", 1)[0] for word in overrides}
    if "task" in named or not named & {"model", "dataset"}:
        return config
    pairs = {name: _pair_of(CONF, name) for name in options("task")}
    asked = (config.model.name, config.dataset.name)
    found = [name for name, pair in pairs.items() if pair == asked]
    if not found:  # what was not named is the default task's and may give way
        found = [
            name
            for name, pair in pairs.items()
            if all(own == wanted or group not in named for group, own, wanted in zip(("model", "dataset"), pair, asked))
        ]
    if len(found) == 1:
        return compose([f"task={found[0]}", *overrides])
    if found:
        raise EdadmError(f"tasks {', '.join(found)} all have what was named: choose one with task=...")
    known = ", ".join(f"model={model} dataset={dataset}" for model, dataset in pairs.values())
    raise Skipped(f"no task pairs model={config.model.name} with dataset={config.dataset.name}; there are: {known}")


@lru_cache
def _pair_of(conf: Path, task: str) -> tuple[str, str]:
    """Return the names of a task's model and dataset: those its file chooses, else those of ``conf/config.yaml``."""
    chosen: dict[str, str] = {}
    for path in (conf / "config.yaml", conf / "task" / f"{task}.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for entry in content.get("defaults", []):
            if isinstance(entry, dict):
                chosen |= {key.removeprefix("override /"): name for key, name in entry.items()}
    return chosen["model"], chosen["dataset"]


class Skipped(EdadmError):
    """The combination that was asked for does not exist; in a sweep the other jobs go on."""


def check(values: Mapping[str, Any]) -> None:
    """Raise EdadmError for a value that cannot be run, naming it and the choices."""
    for what in ("weight", "act", "softmax"):
        _choice(f"bits.{what}", values["bits"][what], WIDTHS, "2 to 8, or 16 / 32 to leave it in floating point")
    _choice("precision", values["precision"], PRECISIONS)
    _choice("reconstruction.cache", values["reconstruction"].get("cache", CACHES[0]), CACHES)
    _choice("device", str(values["device"]).split(":")[0], ("auto", "cpu", "cuda"))
    for what, least in WHOLE_NUMBERS.items():
        _whole_number(what, _at(values, what), least)
    for group in ("sampler", "calibration_sampler"):
        if "steps" in (values.get(group) or {}):
            _whole_number(f"{group}.steps", values[group]["steps"], least=1)
        for key, value in (values.get(group) or {}).items():
            if key not in WORDS_OF_SAMPLER and value is not None and not _is_number(value):
                raise EdadmError(f"{group}.{key}={value}: give a number")
    _choice("tf32", values["tf32"], (True, False), "true or false")
    if values["threads"] is not None:
        _whole_number("threads", values["threads"], least=1)
    if values["profile"]["batch"] > values["profile"]["rows"]:
        raise EdadmError(
            f"profile.batch={values['profile']['batch']} is more than profile.rows={values['profile']['rows']}: "
            "a minibatch repeats no row"
        )
    for what in ("load", "images", "calibration_set"):
        if values[what] is not None and not Path(values[what]).expanduser().exists():
            raise EdadmError(f"{what}={values[what]} does not exist")
    if values["load"] and values["images"]:
        raise EdadmError("load= samples a saved model and images= scores images that exist: give one of them")


def _choice(name: str, value: Any, choices: Sequence[Any], words: str | None = None) -> None:
    if value not in choices:
        raise EdadmError(f"{name}={value}: choose {words or ', '.join(map(str, choices))}")


def _whole_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EdadmError(f"{name}={value}: give a whole number of at least {least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at(values: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def pick_recipe(recipe: Mapping[str, Any], granularity: str, optimization: str, profile: str, bits: int) -> Recipe:
    """Return the row of a recipe file for a combination; learning rates by the bits of the weights.

    A number under ``recipe`` itself (``recipe.lr_weight=0.1``) replaces the row's.
    Raises EdadmError when no row has the combination, or two have it.
    """
    wanted = {"granularity": granularity, "optimization": optimization, "profile": profile}
    rows = [row for row in recipe["rows"] if all(value in row[key] for key, value in wanted.items())]
    if len(rows) != 1:
        raise EdadmError(
            f"{'no recipe' if not rows else f'{len(rows)} recipes'} of task {recipe['task']} for "
            f"{', '.join(f'{key}={value}' for key, value in wanted.items())}: "
            f"there must be one row for it in conf/recipe/{recipe['task']}.yaml"
        )
    row = rows[0] | {key: recipe[key] for key in RECIPE_NUMBERS if recipe[key] is not None}
    return Recipe(
        lr_weight=_by_bits(row["lr_weight"], bits),
        lr_act=_by_bits(row["lr_act"], bits),
        layer_loss_weight=float(row["layer_loss_weight"]),
        layer_loss_pass=row["layer_loss_pass"],
    )


def _by_bits(rates: Mapping[int, float] | float, bits: int) -> float:
    """Return the rate of the smallest listed width that holds ``bits``, the widest one's for floating point."""
    if not isinstance(rates, Mapping):
        return float(rates)
    return float(rates[min((width for width in rates if width >= bits), default=max(rates))])


def own_of_task(settings: Settings) -> DictConfig:
    """Return the configuration of a run's task and profile without any other choice."""
    return compose([f"task={settings['task.name']}", f"profile={settings['profile.name']}"])


def has_own_sampler(settings: Settings) -> bool:
    """Say whether images are sampled as the task has it, which its expected scores are of."""
    own = own_of_task(settings)
    return OmegaConf.to_container(own.sampler, resolve=True) == settings["sampler"]


def variant(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return in what the parts of a run differ from its method's own: a part's name, or single numbers."""
    if values["bits"]["weight"] >= OFF and values["bits"]["act"] >= OFF:
        return {}  # nothing is quantized, whatever the parts are
    words = [f"task={values['task']['name']}", f"method={values['method']}"]
    own = compose(words + [f"{group}={values[group]['name']}" for group in ("preset", "profile")])
    differences: dict[str, Any] = {}
    for key in PROFILE_NUMBERS:
        if own.profile[key] != values["profile"][key]:
            differences[f"profile.{key}"] = own.profile[key] = values["profile"][key]
    for slot in SLOTS:
        part = OmegaConf.to_container(own[slot], resolve=True)
        assert isinstance(part, dict)
        if part["name"] != values[slot]["name"]:
            differences[slot] = values[slot]["name"]
        else:
            changed = {key: value for key, value in values[slot].items() if part.get(key) != value}
            differences |= {f"{slot}.{key}": value for key, value in changed.items() if (slot, key) != CACHE}
    if values.get("calibration_sampler"):
        differences |= _of_calibration_sampler(values["calibration_sampler"], own.get("calibration_sampler"))
    differences |= {
        f"recipe.{key}": values["recipe"][key] for key in RECIPE_NUMBERS if values["recipe"][key] is not None
    }
    if values["reconstruction"]["granularity"] is None:
        unused = ("optimization", "recipe", "profile.iterations", "profile.batch")
        differences = {key: value for key, value in differences.items() if not key.startswith(unused)}
    return differences


def _of_calibration_sampler(part: Mapping[str, Any], own: DictConfig | None) -> dict[str, Any]:
    """Return in what the sampler of the calibration trajectories differs from the task's."""
    standard: Any = {} if own is None else OmegaConf.to_container(own, resolve=True)
    if standard.get("name") != part["name"]:
        return {"calibration_sampler": part["name"]}
    return {f"calibration_sampler.{key}": value for key, value in part.items() if standard.get(key) != value}
