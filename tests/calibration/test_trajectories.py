from __future__ import annotations

import pytest
import torch
from torch import nn

from edadm.calibration.trajectories import Trajectories, collect
from edadm.errors import Diverged, EdadmError
from edadm.sampling.ddim import Sampler
from edadm.sampling.guidance import ClassConditions, Guidance
from edadm.sampling.latent import PLMS
from edadm.sampling.multistep import DPMSolver
from edadm.sampling.noise import CALIBRATION, EVALUATION, noise
from tests.toys import CountLarge

SHAPE = (3, 4, 4)
SAMPLER = Sampler("quad", 3, eta=0.5)


class Network(nn.Module):
    """Depends on the whole batch, so that a changed layout shows; has a middle that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.middle = Middle()
        self.unused = nn.Identity()

    def forward(self, x, t):
        hidden, _ = self.middle(x, t)
        return hidden[:, :3] + 0.1 * x.mean()


class Middle(nn.Module):
    def forward(self, x, t):
        return torch.cat([x, x.flip(1)], dim=1) + t.view(-1, 1, 1, 1) / 1000, t


def collected(n, **changes):
    settings = {"shape": SHAPE, "seed": 0, "batch": 4, "feature_module": "middle"} | changes
    return collect(Network(), SAMPLER, n, **settings)


def test_inputs_and_features_of_every_step_are_kept():
    made = collected(8)
    assert made.x.dtype == made.features.dtype == torch.float32
    assert made.x.shape == (3, 8, *SHAPE) and made.features.shape == (3, 8, 6, 4, 4)
    assert made.timesteps.tolist() == SAMPLER.timesteps and (made.steps, made.count) == (3, 8)
    assert torch.equal(made.x[0], noise(CALIBRATION, 0, range(8), SHAPE))
    for k, t in enumerate(SAMPLER.timesteps):
        assert torch.equal(made.features[k], Middle()(made.x[k], torch.full((8,), t))[0])


@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_a_trajectory_does_not_depend_on_how_many_there_are(n):
    whole, part = collected(8), collected(n)
    assert torch.equal(part.x, whole.x[:, :n]) and torch.equal(part.features, whole.features[:, :n])


def test_seed_drives_the_noise_and_evaluation_has_its_own():
    assert not torch.equal(collected(4).x[0], collected(4, seed=1).x[0])
    assert not torch.equal(collected(4).x[0], noise(EVALUATION, 0, range(4), SHAPE))


@pytest.mark.parametrize(("n", "kept"), [(8, 4), (3, 3)])
def test_features_of_the_first_batch_only(n, kept):
    made = collected(n, feature_batches=1)
    assert made.features.shape[1] == kept and torch.equal(made.features, collected(n).features[:, :kept])


def test_features_are_optional_and_leave_no_hook():
    assert collected(4, feature_module=None).features is None
    network = Network()
    collect(network, SAMPLER, 2, shape=SHAPE, seed=0, feature_module="middle")
    assert not network.middle._forward_hooks


def test_features_outlive_changes_in_place():
    class Changing(Network):
        def forward(self, x, t):
            hidden, _ = self.middle(x, t)
            return hidden.mul_(0)[:, :3]

    made = collect(Changing(), SAMPLER, 2, shape=SHAPE, seed=0, feature_module="middle")
    assert (made.features != 0).any()


def test_an_unknown_module_is_named_with_the_nearest_ones():
    with pytest.raises(EdadmError, match=r"no module 'midle'.*did you mean middle"):
        collected(2, feature_module="midle")


def test_a_module_that_does_not_run_is_named():
    with pytest.raises(EdadmError, match="unused was not run"):
        collected(2, feature_module="unused")


def test_a_function_has_no_features():
    with pytest.raises(EdadmError, match="middle of a function"):
        collect(lambda x, t: x, SAMPLER, 2, shape=SHAPE, seed=0, feature_module="middle")
    assert collect(lambda x, t: x, SAMPLER, 2, shape=SHAPE, seed=0).count == 2


def test_divergence_is_named():
    with pytest.raises(Diverged, match="step 1 of 3"):
        collect(lambda x, t: x * float("nan"), SAMPLER, 2, shape=SHAPE, seed=0)


def test_progress_counts_the_trajectories_asked_for():
    seen = []
    collected(6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]


def test_save_and_load_keep_every_bit(tmp_path):
    made = collected(4)
    loaded = Trajectories.load(made.save(tmp_path / "t.safetensors", {"task": "toy"}))
    assert torch.equal(loaded.x, made.x) and torch.equal(loaded.features, made.features)
    assert torch.equal(loaded.timesteps, made.timesteps)
    bare = Trajectories(made.x, made.timesteps)
    assert Trajectories.load(bare.save(tmp_path / "t.safetensors")).features is None


def test_tensors_that_do_not_fit_are_errors():
    x, timesteps = torch.zeros(3, 2, 1), torch.tensor([2, 1, 0])
    with pytest.raises(EdadmError, match="do not fit 2 timesteps"):
        Trajectories(x, timesteps[:2])
    with pytest.raises(EdadmError, match="do not belong to 3 steps of 2"):
        Trajectories(x, timesteps, torch.zeros(3, 5, 1))
    with pytest.raises(ValueError, match="0 trajectories"):
        collected(0)
    with pytest.raises(EdadmError, match="2 rows of class_labels do not fit 3 trajectories"):
        Trajectories(torch.zeros(2, 3, 1), timesteps[:2], condition={"class_labels": torch.zeros(2)})


def test_a_step_of_two_calls_has_the_input_of_the_first_and_the_feature_of_the_last():
    asked = []

    class Watched(Network):
        def forward(self, x, t):
            asked.append((x, t))
            return super().forward(x, t)

    sampler = PLMS(steps=4)
    made = collect(Watched(), sampler, 4, shape=SHAPE, seed=0, batch=4, feature_module="middle")
    assert [int(t[0]) for _, t in asked] == [751, 501, 501, 251, 1] and made.timesteps.tolist() == [751, 501, 251, 1]
    for step, (first, last) in enumerate([(0, 1), (2, 2), (3, 3), (4, 4)]):
        assert torch.equal(made.x[step], asked[first][0])
        assert torch.equal(made.features[step], Middle()(*asked[last])[0])


def test_fractional_times_are_kept(tmp_path):
    made = collect(Network(), DPMSolver(4), 2, shape=SHAPE, seed=0, batch=4)
    assert made.timesteps.dtype == torch.float64 and made.timesteps.tolist() == DPMSolver(4).timesteps
    assert torch.equal(Trajectories.load(made.save(tmp_path / "t.safetensors")).timesteps, made.timesteps)


class Conditional(Network):
    def forward(self, x, t, class_labels):
        return super().forward(x, t + class_labels)


def collected_guided(n, scale=3.0, **changes):
    settings = {"shape": SHAPE, "seed": 0, "batch": 4, "feature_module": "middle"} | changes
    return collect(Conditional(), SAMPLER, n, guidance=Guidance(ClassConditions(10, 10), scale), **settings)


@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_a_guided_trajectory_has_its_condition_and_two_features(n):
    made, labels = collected_guided(n), ClassConditions(10).labels(CALIBRATION, 0, range(n))
    assert torch.equal(made.condition["class_labels"], labels) and made.null["class_labels"].tolist() == [10]
    assert made.x.shape == (3, n, *SHAPE) and made.features.shape == (3, 2 * n, 6, 4, 4)
    for start in range(0, n, 4):  # null conditions first in every batch
        rows = slice(start, min(start + 4, n))
        x, seen = made.x[:, rows], made.features[:, 2 * rows.start : 2 * rows.stop].chunk(2, dim=1)
        for k, t in enumerate(SAMPLER.timesteps):
            assert torch.equal(seen[0][k], Middle()(x[k], torch.full((x.shape[1],), t + 10))[0])
            assert torch.equal(seen[1][k], Middle()(x[k], t + labels[rows])[0])


@pytest.mark.parametrize("feature_batches", [None, 1])
@pytest.mark.parametrize("n", [3, 6, 8])
def test_what_is_kept_is_what_the_network_saw_one_step_after_the_other(n, feature_batches, tmp_path):
    network, given, seen = Conditional(), [], []

    def watch(_, args, output):
        given.append(args[0])
        seen.append(output[0])

    network.middle.register_forward_hook(watch)
    guidance = Guidance(ClassConditions(10, 10), 3.0)
    settings = {"shape": SHAPE, "seed": 0, "batch": 4, "feature_module": "middle", "feature_batches": feature_batches}
    made = collect(network, SAMPLER, n, guidance=guidance, **settings)
    steps = [slice(3 * number, 3 * number + 3) for number in range(-(-n // 4))]
    x = torch.cat([torch.stack(given[part])[:, :4] for part in steps], dim=1)[:, :n].contiguous()
    features = [
        torch.stack(seen[part]).unflatten(1, (2, 4))[:, :, : n - 4 * number].flatten(1, 2)
        for number, part in enumerate(steps[:feature_batches])
    ]
    expected = Trajectories(x, made.timesteps, torch.cat(features, dim=1), made.condition, made.null)
    files = (one.save(tmp_path / f"{number}.safetensors") for number, one in enumerate((made, expected)))
    assert next(files).read_bytes() == next(files).read_bytes()


def test_nothing_that_is_kept_is_held_twice():
    with CountLarge(3 * 8 * 3 * 4 * 4) as large:  # numbers of x
        made = collected(8, feature_batches=2)
    assert large.count == 2 and made.features.numel() > made.x.numel()  # x and features, empty


def test_a_guided_trajectory_does_not_depend_on_how_many_there_are():
    assert torch.equal(collected_guided(3).x, collected_guided(8).x[:, :3])
    assert not torch.equal(collected_guided(3).x, collected_guided(3, scale=1.0).x)


def test_scale_one_has_a_condition_and_one_feature():
    made = collected_guided(4, scale=1.0)
    assert made.null is None and made.condition is not None and made.features.shape[1] == 4


def test_guided_trajectories_come_back_from_a_file(tmp_path):
    made = collected_guided(4, feature_batches=1)
    loaded = Trajectories.load(made.save(tmp_path / "t.safetensors"))
    assert torch.equal(loaded.features, made.features) and loaded.null.keys() == made.null.keys()
    assert torch.equal(loaded.condition["class_labels"], made.condition["class_labels"])


def test_features_of_tokens_have_their_channels_behind_the_rows():
    class Tokens(nn.Module):
        def forward(self, x):
            return x.flatten(2).transpose(1, 2)  # (B, 16, 3)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.middle = Tokens()

        def forward(self, x, timestep):
            self.middle(x)
            return (torch.zeros_like(x),)

    made = collect(Network(), SAMPLER, 2, shape=SHAPE, seed=0, feature_module="middle")
    assert torch.equal(made.features, made.x.flatten(3))
