from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import hydra
import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.version import getbase
from omegaconf import OmegaConf

from edadm import config
from edadm.errors import EdadmError
from edadm.parts import build_part

GROUPS = sorted(path.name for path in config.CONF.iterdir() if path.is_dir())
PLUGINS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "slurm": "hydra_plugins.hydra_submitit_launcher"}


def available(group: str, name: str) -> bool:
    """Tell whether a launcher's plugin is installed."""
    try:
        return group != "launcher" or name not in PLUGINS or importlib.util.find_spec(PLUGINS[name]) is not None
    except ModuleNotFoundError:
        return False


CHOICES = [(group, name) for group in GROUPS for name in config.options(group) if available(group, name)]


def settings(*overrides: str) -> config.Settings:
    return config.settings(config.compose(overrides), overrides)


def words(group: str, name: str) -> list[str]:
    beside = {
        "scope=published": ["method=edadm"],
        "model=sd14": ["dataset=coco"],
        "dataset=imagenet": ["model=dit_xl_2"],
    }
    word = f"{group}={name}"
    return [*beside.get(word, []), word]


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{group}={name}" for group, name in CHOICES])
def test_every_choice_composes_and_passes_the_checks(group: str, name: str) -> None:
    settings(*words(group, name))


@pytest.mark.parametrize("group", ["calibration", "ranges", "task"])
def test_every_part_instantiates(group: str) -> None:
    for name in config.options(group):
        values = settings(*words(group, name))
        assert build_part(values[group]) is not None


def test_every_entry_of_the_defaults_list_is_explained_in_the_help() -> None:
    template = OmegaConf.load(config.CONF / "config.yaml").hydra.help.template
    for group in ("task", "method", "bits", "scope", "preset", "profile", *config.SLOTS):
        assert group in template


def test_python_run_py_alone_is_edadm_at_w4a8_on_the_embedded_task() -> None:
    values = settings()
    assert values.label == "edadm w4a8 seed 0"
    assert (values["task.name"], values["profile.name"]) == ("cifar10_tiny", "reference")


@pytest.mark.parametrize(
    ("method", "calibration", "reconstruction", "optimization"),
    [
        ("rtn", "random", "none", None),
        ("adaround", "random", "layer", "two_phase"),
        ("brecq", "random", "block", "two_phase"),
        ("ptq4dm", "normal", "block", "joint"),
        ("qdiffusion", "uniform", "block", "two_phase"),
        ("edadm", "tdac", "fbr", "joint"),
    ],
)
def test_methods_are_the_published_compositions(
    method: str, calibration: str, reconstruction: str, optimization: str | None
) -> None:
    values = settings(f"method={method}")
    assert values["calibration.name"] == calibration
    assert values["reconstruction.name"] == reconstruction
    assert values["ranges.name"] == "mse"
    if optimization is not None:
        assert values["optimization.name"] == optimization


def test_all_methods_share_rows_batch_iterations_and_search_grid() -> None:
    shared = [
        tuple(settings(f"method={method}")[key] for key in ("profile", "ranges", "scope"))
        for method in config.options("method")
    ]
    assert all(item == shared[0] for item in shared)


def test_a_part_on_the_command_line_wins_over_the_method() -> None:
    values = settings("calibration=random", "reconstruction=block", "method=edadm")
    assert (values["calibration.name"], values["reconstruction.name"]) == ("random", "block")


def test_variant_names_what_differs_from_the_method() -> None:
    assert settings("method=qdiffusion", "bits=w8a8", "preset=paper", "profile=demo").variant == {}
    assert settings("calibration=random", "profile.rows=512").variant == {"calibration": "random", "profile.rows": 512}
    assert settings("calibration.weight=5", "recipe.lr_weight=0.1").variant == {
        "calibration.weight": 5,
        "recipe.lr_weight": 0.1,
    }


def test_an_optimization_without_reconstruction_is_no_variant() -> None:
    assert settings("method=rtn", "optimization=two_phase", "profile.iterations=7", "recipe.lr_act=1").variant == {}


@pytest.mark.parametrize(
    ("word", "choices"),
    [("method=nope", "edadm"), ("task=nope", "cifar10_tiny"), ("bits=w9a9", "w4a8"), ("calibration=nope", "tdac")],
)
def test_an_unknown_name_lists_the_choices(word: str, choices: str) -> None:
    with pytest.raises(MissingConfigException, match=choices):
        config.compose([word])


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigCompositionException):
        config.compose(["sede=1"])


@pytest.mark.parametrize(("weight", "act"), [(2, 2), (5, 7), (16, 8), (32, 32)])
def test_any_width_of_2_to_8_or_off_is_accepted(weight: int, act: int) -> None:
    assert settings(f"bits.weight={weight}", f"bits.act={act}").bits_name == f"w{weight}a{act}"


@pytest.mark.parametrize(
    "word",
    [
        "bits.weight=1", "bits.weight=9", "bits.act=0", "bits.act=12", "bits.weight=-4", "bits.act=4.5", "bits.act=four",
        "bits.softmax=9", "precision=fp64", "device=tpu", "n_images=-1", "n_images=1.5", "profile.rows=0", "seed=-1",
        "seed=true", "threads=0", "profile.batch=10000", "load=/nowhere", "images=/nowhere", "calibration_set=/nowhere",
        "sampler.steps=0", "chunk=0",
    ],
)  # fmt: skip
def test_an_impossible_value_is_named(word: str) -> None:
    name = word.split("=")[0]
    with pytest.raises(EdadmError, match=name.replace(".", r"\.")):
        settings(word)


@pytest.mark.parametrize("steps", ["2.5", "0", "true"])
def test_steps_of_the_calibration_are_a_whole_number_as_others(steps: str) -> None:
    with pytest.raises(
        EdadmError, match=rf"calibration_sampler\.steps={steps}: give a whole number".replace("true", "True")
    ):
        settings("task=imagenet_ldm4", f"calibration_sampler.steps={steps}")


def test_load_and_images_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match="one of them"):
        settings(f"load={tmp_path}", f"images={tmp_path}")


def test_a_published_scope_is_that_of_the_tasks_it_was_published_for() -> None:
    assert settings("method=qdiffusion", "scope=published", "task=cifar10_ddim")["scope.split"]
    with pytest.raises(
        EdadmError, match="command for cifar10_ddim, cifar10_tiny: use scope=full for task lsun_church_"
    ):
        settings("method=qdiffusion", "scope=published", "task=lsun_church_ldm8")


def test_numbers_that_no_stage_could_use_are_refused() -> None:
    for word in ("profile.range_batches=0", "metrics.sqnr_rows=0", "metrics.bootstrap=x", "tf32=3"):
        with pytest.raises(EdadmError, match=word.partition("=")[0]):
            settings(word)


def test_a_method_without_published_scope_says_which_have_one() -> None:
    with pytest.raises(EdadmError, match="qdiffusion"):
        settings("method=rtn", "scope=published")


def test_presets_differ_where_the_paper_and_its_code_do() -> None:
    released, paper = settings("preset=released"), settings("preset=paper")
    assert released["scope.edge"] == {"time_mlp_1": {"weight": 8}, "output": {"weight": 8, "act": 32}}
    assert paper["scope.edge"] == {"input": {"weight": 8}, "output": {"weight": 8, "act": 8}}
    assert (released["ranges.mid_zero_point"], paper["ranges.mid_zero_point"]) == (False, True)
    assert (released["calibration.threshold"], paper["calibration.threshold"]) == (None, 3.0)
    assert (released["preset.layer_loss_pass"], paper["preset.layer_loss_pass"]) == ("separate", "shared")


def test_a_missing_recipe_is_an_error_that_names_the_combination() -> None:
    recipe = dict(settings()["recipe"], rows=[])
    with pytest.raises(EdadmError, match=r"granularity=fbr, optimization=joint, profile=demo.*conf/recipe"):
        config.pick_recipe(recipe, "fbr", "joint", "demo", 4)


def test_a_recipe_must_not_be_ambiguous() -> None:
    recipe = settings()["recipe"]
    with pytest.raises(EdadmError, match="2 recipes"):
        config.pick_recipe(dict(recipe, rows=recipe["rows"] * 2), "fbr", "joint", "demo", 4)


def test_every_method_has_a_recipe_in_every_profile() -> None:
    for method in config.options("method"):
        for profile in config.options("profile"):
            settings(f"method={method}", f"profile={profile}")


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.5), (4, 0.5), (5, 0.05), (8, 0.05), (32, 0.05)])
def test_learning_rates_follow_the_bits_of_the_weights(bits: int, expected: float) -> None:
    row = {"granularity": ["fbr"], "optimization": ["joint"], "profile": ["demo"]}
    numbers = {"lr_weight": {4: 0.5, 8: 0.05}, "lr_act": 1e-3, "layer_loss_weight": 0.8, "layer_loss_pass": None}
    recipe = {"task": "toy", "rows": [row | numbers]} | dict.fromkeys(config.RECIPE_NUMBERS)
    assert config.pick_recipe(recipe, "fbr", "joint", "demo", bits).lr_weight == expected


def test_a_pair_of_model_and_dataset_finds_its_task() -> None:
    values = settings("model=cifar10_tiny", "dataset=cifar10", "sampler.steps=7")
    assert (values["task.name"], values["sampler.steps"]) == ("cifar10_tiny", 7)


def test_a_model_or_dataset_alone_finds_the_only_task_that_has_it() -> None:
    values = settings("model=ldm8_church")
    assert (values["task.name"], values["sampler.beta_end"]) == ("lsun_church_ldm8", 0.0155)
    assert settings("dataset=drawbench")["task.name"] == "drawbench_sd14"
    with pytest.raises(EdadmError, match=r"coco_sd14, drawbench_sd14 .*task="):
        settings("model=sd14")


def test_a_task_of_the_paper_is_the_papers_experiment() -> None:
    values = settings("task=lsun_bedroom_ldm4", "bits=w4a8")
    assert (
        values["profile"] | {"name": "paper", "rows": 1024, "iterations": 5000, "range_batches": 32}
        == values["profile"]
    )
    assert (values["sampler.name"], values["sampler.steps"], values["sampler.eta"]) == ("ddim_leading", 200, 1.0)
    assert values.recipe().lr_act == 5e-3 and values.variant == {}
    guided = settings("task=coco_sd14")
    assert (guided["sampler.name"], guided["sampler.guidance_scale"], guided["scope.split"]) == ("plms", 7.5, False)
    assert settings("task=imagenet_ldm4", "bits=w8a8").recipe().lr_weight == 1e-4


def test_another_sampler_of_the_images_leaves_the_calibration_as_it_is() -> None:
    values = settings("task=imagenet_ldm4", "sampler=dpm_solver", "sampler.steps=10")
    calibrating = values["calibration_sampler"]
    assert (calibrating["name"], calibrating["steps"], values["sampler.name"]) == ("ddim_leading", 20, "dpm_solver")
    assert values.variant == {} and not config.has_own_sampler(values)
    other = settings("task=imagenet_ldm4", "sampler@calibration_sampler=plms")
    assert other.variant == {"calibration_sampler": "plms"} and config.has_own_sampler(other)
    fewer = settings("task=imagenet_ldm4", "calibration_sampler.steps=10")
    assert fewer.variant == {"calibration_sampler.steps": 10}


def test_a_pair_without_a_task_is_skipped_and_lists_the_pairs() -> None:
    with pytest.raises(config.Skipped, match=r"dataset=imagenet.*dataset=cifar10"):
        settings("model=cifar10_tiny", "dataset=imagenet")


def test_another_folder_of_configurations_is_not_mistaken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("method=rtn",)
    ours = config.compose(words).seed
    shutil.copytree(config.CONF, tmp_path / "conf")
    file = tmp_path / "conf" / "config.yaml"
    file.write_text(re.sub(r"^seed: .*$", f"seed: {ours + 7}", file.read_text(encoding="utf-8"), flags=re.M))
    pair = tmp_path / "conf" / "task" / "pair.yaml"
    pair.write_text("# @package _global_\ndefaults:\n  - override /model: one\n  - override /dataset: two\n")
    with monkeypatch.context() as patch:
        patch.setattr(config, "CONF", tmp_path / "conf")
        assert config.compose(words).seed == ours + 7
        assert config._pair_of(config.CONF, "pair") == ("one", "two")
    assert config.compose(words).seed == ours


def test_another_application_of_hydra_keeps_its_configuration(tmp_path: Path) -> None:
    """A user's own application may call edadm.quantize while Hydra is initialised with the user's files."""
    (tmp_path / "config.yaml").write_text("mine: 3\n")
    config._compose.cache_clear()
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        assert settings("method=rtn")["method"] == "rtn"
        assert hydra.compose("config") == {"mine": 3} and str(getbase()) == "1.2"
    config._compose.cache_clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        assert config._is_in_our_job() and settings("method=rtn")["method"] == "rtn"
    assert not config._is_in_our_job()
