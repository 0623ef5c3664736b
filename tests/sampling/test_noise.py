from __future__ import annotations

import torch

from edadm.sampling.noise import CALIBRATION, EVALUATION, SELECTION, noise, numpy_rng, step_noise

SHAPE = (3, 8, 8)


def test_a_row_depends_on_its_image_number_only():
    together = noise(EVALUATION, 1234, range(10), SHAPE)
    assert together.dtype == torch.float32
    assert torch.equal(noise(EVALUATION, 1234, [7, 2], SHAPE), together[[7, 2]])
    assert torch.equal(torch.cat([noise(EVALUATION, 1234, [i], SHAPE) for i in range(10)]), together)


def test_streams_seeds_steps_and_images_are_disjoint():
    draws = [
        noise(EVALUATION, 0, [0, 1, 11], SHAPE),
        noise(EVALUATION, 1, [0, 1], SHAPE),
        noise(CALIBRATION, 0, [0, 1], SHAPE),
        step_noise(EVALUATION, 0, 0, [0, 1], SHAPE),
        step_noise(EVALUATION, 0, 1, [0, 1, 11], SHAPE),
        step_noise(EVALUATION, 0, 11, [0, 1], SHAPE),
        step_noise(CALIBRATION, 0, 0, [0, 1], SHAPE),
    ]
    rows = torch.cat(draws).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.4  # 192 numbers: 5 standard deviations of 0.072


def test_noise_is_standard_normal():
    draw = noise(EVALUATION, 3, range(64), (3, 16, 16))
    assert abs(draw.mean()) < 0.02 and abs(draw.std() - 1) < 0.02  # 49152 numbers: over 4 standard deviations


def test_noise_needs_no_global_state():
    torch.manual_seed(0)
    first = noise(EVALUATION, 5, [3], SHAPE)
    torch.manual_seed(1)
    assert torch.equal(noise(EVALUATION, 5, [3], SHAPE), first)


def test_noise_is_pinned():
    """Another value means other images for every record: raise the version of `Sampler` and of the row samplers."""
    draw = noise(EVALUATION, 1234, [0], (4,))[0]
    torch.testing.assert_close(draw, torch.tensor([1.26255, -0.60029393, -1.2231059, -0.72753924]), rtol=1e-6, atol=0)


def test_keys_are_not_run_together():
    assert numpy_rng(SELECTION, 1, 23).random() != numpy_rng(SELECTION, 12, 3).random()
    assert numpy_rng(SELECTION, 1, "a").random() == numpy_rng(SELECTION, 1, "a").random()
