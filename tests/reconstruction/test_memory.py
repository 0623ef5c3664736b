from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from edadm import config
from edadm.keys import ROWS_PER_PASS, Run
from edadm.parts import build_part
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel
from edadm.quant.ranges import MinMax
from edadm.reconstruction.memory import PROCESS, Plan, UnitSize, measure, need_at
from edadm.reconstruction.parking import held_tensors
from edadm.reconstruction.passes import PausedPasses
from edadm.reconstruction.random import seeded
from edadm.reconstruction.reconstruct import reconstruct
from edadm.reconstruction.settings import Joint, TwoPhase
from edadm.store import Store
from edadm.tasks.compvis_unet import SD_V1, unet_config
from edadm.tasks.dit_checkpoint import DIT_XL_2_256, dit_config
from edadm.tasks.model_folder import empty_model
from tests.toys import DENOISERS, tiny_unet

JOINT = Joint(1, lr_weight=0.1, lr_act=1e-3, batch=2)
GIB = 2**30
ROWS = 5


@pytest.fixture(autouse=True)
def _quiet():
    """Without diffusers' warning about position numbers with a batch axis."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "settings", [JOINT, replace(JOINT, excluded_layer="main_path", input_prob=0.0)], ids=["official", "paper"]
)
@pytest.mark.parametrize("granularity", ["fbr", "layer"])
@pytest.mark.parametrize("name", DENOISERS)
def test_what_is_counted_is_what_is_cached(name, granularity, settings):
    network, inputs = QuantModel.wrap(DENOISERS[name].build(), Bits(8, 8)), DENOISERS[name].inputs(ROWS)
    rows, cached = list(inputs.values()), {}
    sizes = measure(network, rows, list(inputs), granularity)
    set_weight_ranges(network, MinMax())
    set_activation_ranges(network, MinMax(), [lambda: network(**inputs)])
    reconstruct(
        network, rows, settings, granularity, seeded(0), names=list(inputs), rows_per_pass=3,
        observe=lambda step: cached.update({step.unit.name: (step.data.mebibytes * 2**20, step.phase)}),
    )  # fmt: skip
    assert [size.name for size in sizes] == list(cached)
    assert [ROWS * size.cached(cached[size.name][1]) for size in sizes] == [found for found, _ in cached.values()]


@pytest.mark.parametrize("name", ["unet2d", "unet2d_condition", "dit"])
def test_what_a_pass_holds_is_that_of_a_real_pass(name):
    network, inputs = QuantModel.wrap(DENOISERS[name].build(), Bits(8, 8)), DENOISERS[name].inputs(ROWS)
    sizes = measure(network, list(inputs.values()), list(inputs))
    units = [(unit.name, unit.module) for unit in network.units("block")]
    own = {tensor.data_ptr() for tensor in (*inputs.values(), *network.parameters(), *network.buffers())}
    again = [name for name, _ in units if network.family.layer_runs_again(name)]
    with PausedPasses(lambda _: network(**inputs), 1, units, again=again) as passes, torch.no_grad():
        for index, size in enumerate(sizes):
            passes.input(index, 0)
            held = {t.untyped_storage().data_ptr(): t for t in held_tensors(passes._passes[0], ROWS)}
            real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in held.items() if pointer not in own)
            assert size.waiting == real // ROWS


def test_sizes_of_a_unit_by_hand():
    network = QuantModel.wrap(tiny_unet(), Bits(4, 8))
    sizes = {size.name: size for size in measure(network, (torch.empty(1, 3, 8, 8), torch.empty(1)))}
    block = sizes["down_blocks.1.resnets.0"]  # 8 channels of 4 x 4 to 16, time of 32
    plane = 4 * 4 * 4
    assert block.inputs == (8 * plane, 4 * 32) and block.target == 16 * plane
    # conv1, time_emb_proj, conv2, conv_shortcut, of which the last is excluded by registration, conv2 by the main path
    assert block.layer_targets == {"registration": 2 * 16 * plane + 4 * 16, "main_path": 2 * 16 * plane + 4 * 16}
    assert block.layers_in == (8 + 16 + 8) * plane + 4 * 32 and block.layers_out == 3 * 16 * plane + 4 * 16
    assert block.weights == 9 * 8 * 16 + 32 * 16 + 9 * 16 * 16 + 8 * 16
    assert block.widest == 2 * 16 * plane
    attention = sizes["down_blocks.1.attentions.0"]
    assert attention.logits == attention.widest_logits == 4 * 16 * 16


UNIT = UnitSize(
    name="block", kind="block", inputs=(100, 10), target=50, layer_targets={"registration": 30, "main_path": 40},
    waiting=200, layers_in=300, layers_out=150, logits=80, widest=180, widest_logits=80, weights=1000,
)  # fmt: skip


def test_phases_cache_what_they_read():
    (joint,), (weights, activations) = JOINT.phases(), TwoPhase(1, 1).phases()
    assert UNIT.cached(joint) == 2 * 100 + 10 + 50 + 30
    assert UNIT.cached(replace(joint, layer_loss_weight=0.0)) == 2 * 100 + 10 + 50
    assert UNIT.cached(replace(joint, input_prob=1.0)) == 100 + 10 + 50 + 30  # the quantized prefix alone
    assert UNIT.cached(replace(weights, layer_loss_weight=0)) == 100 + 10 + 50
    assert UNIT.cached(replace(activations, layer_loss_weight=0)) == 100 + 10 + 50  # full precision alone


def test_a_second_pass_doubles_what_is_kept_for_backward():
    (phase,) = JOINT.phases()
    shared = UNIT.gradients(replace(phase, layer_loss_pass="shared"))
    kept = 3 * 300 + 1.5 * 150 + 3.25 * 80
    assert shared == kept + 2 * 80 and UNIT.gradients(phase) == 2 * kept + 2 * 80
    assert UNIT.gradients(replace(phase, drop_prob=0.0)) == shared


@pytest.mark.parametrize(
    ("cpu", "place"), [(cpu, place) for cpu in (True, False) for place in ("device", "host", "disk")]
)
def test_needs_are_counted_where_the_cache_lies(cpu, place):
    network = QuantModel.wrap(tiny_unet(), Bits(4, 8))
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    plan = Plan(JOINT.phases, rows=1000, rows_per_pass=1, range_rows=1, cpu=cpu)
    need = need_at(network, [UNIT, replace(UNIT, name="small", target=0)], plan, place)
    kept = 1000 * (290 + 2 * 200)
    assert need.cached == {"block": 290_000, "small": 240_000} and need.largest == "block"
    assert need.waiting == 400_000
    where = "device" if cpu and place == "host" else place
    process = {"device": PROCESS, "host": 0.0, "disk": 0.0} if cpu else {"device": 0.0, "host": PROCESS, "disk": 0.0}
    known = {name: process[name] + kept * (name == where) for name in ("device", "host", "disk")}
    known["device"] += weights + 2 * 1000
    assert need.known == known
    assert {name: need.peaks[name] for name in ("host", "disk")} == {name: known[name] for name in ("host", "disk")}
    assert need.peaks["device"] > known["device"]
    assert need.present == {"device": weights + process["device"], "host": process["host"], "disk": 0.0}


@pytest.mark.parametrize(
    ("task", "parts", "sample"),
    [
        ("coco_sd14", unet_config(SD_V1), {"sample": (4, 64, 64), "timestep": (), "encoder_hidden_states": (77, 768)}),
        ("imagenet_dit", dit_config(DIT_XL_2_256), {"hidden_states": (4, 32, 32), "timestep": (), "class_labels": ()}),
    ],
)
def test_the_largest_tasks_fit_a_gpu_of_24_gib_with_the_cache_on_the_host(task, parts, sample):
    words = [f"task={task}", "method=edadm", "bits=w4a8"]
    settings = config.settings(config.compose(words), words)
    run = Run(settings, build_part(settings["task"]), Store(), "cuda", 1)
    network = QuantModel.wrap(empty_model(*parts), run.bits, run.plan)
    rows = [
        torch.empty(1, *shape, dtype=torch.int64 if name == "class_labels" else None) for name, shape in sample.items()
    ]
    number, batches = settings["profile.rows"], settings["profile.range_batches"]
    plan = Plan(run.optimizer.phases, 2 * number, ROWS_PER_PASS, 2 * -(-number // batches), cpu=False)  # guided
    sizes = measure(network, rows, list(sample))
    device, host = (need_at(network, sizes, plan, place) for place in ("device", "host"))
    assert host.peaks["device"] < 24 * GIB < device.peaks["device"]
    assert host.peaks["host"] > 24 * GIB
