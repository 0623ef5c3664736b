from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.linalg
import torch

from edadm.errors import EdadmError
from edadm.metrics import inception
from edadm.metrics.frechet import NotAvailable, Statistics
from edadm.metrics.images import write_folder
from edadm.metrics.inception import InceptionFeatures, InceptionReference

from .conftest import random_images

N = 12
GENERATED = random_images(N, 16, seed=1)
REAL = random_images(N + 1, 16, seed=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folder(GENERATED, root / "generated")
    write_folder(REAL, root / "real")
    return root / "generated", root / "real"


@pytest.fixture(scope="module")
def features(inception_network) -> InceptionFeatures:
    return inception.extract(GENERATED, inception_network)


@pytest.fixture(scope="module")
def reference(inception_network) -> InceptionReference:
    return inception.build_reference(REAL, inception_network, "patterns", keep_features=True, batch=8)


@pytest.fixture(scope="module")
def fid(features, reference) -> float:
    return inception.fid(features, reference)  # the eigenvalues of a 2048 x 2048 matrix: computed once


@pytest.fixture(scope="module")
def official(folders, inception_weights) -> dict[str, float]:
    """torch-fidelity's own API, with its own extractor, on the same images and weights."""
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=True, isc=True, kid=True, prc=True, kid_subset_size=10,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_weights),
        cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip


def frechet_by_singular_values(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double().numpy(), y.double().numpy()
    # the nonzero eigenvalues of S1 S2 are the squared singular values of X Y^T for centred X, Y: independent of ours
    a, b = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (x, y))
    overlap = scipy.linalg.svdvals(a @ b.T).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap)


@pytest.mark.slow
def test_values_equal_torch_fidelitys_own_api(fid, features, reference, official):
    # rel: its means are float32, and eigenvalues that are 0 up to rounding enter FID as their square roots
    assert fid == pytest.approx(official["frechet_inception_distance"], rel=1e-4)
    mean, deviation = inception.inception_score(features)
    assert mean == pytest.approx(official["inception_score_mean"], rel=1e-5)
    assert deviation == pytest.approx(official["inception_score_std"], rel=1e-3, abs=1e-6)
    mean, deviation = inception.kid(features, reference, subset_size=10)
    assert mean == pytest.approx(official["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(official["kernel_inception_distance_std"], rel=1e-3)
    assert inception.precision_recall(features, reference) == (official["precision"], official["recall"])


@pytest.mark.slow
def test_distances_equal_an_independent_computation(fid, features, reference, inception_network):
    real = inception.extract(REAL, inception_network)
    expected = frechet_by_singular_values(features.pooled, real.pooled)
    assert fid == pytest.approx(expected, rel=1e-4)
    expected = frechet_by_singular_values(features.spatial, real.spatial)
    assert inception.sfid(features, reference) == pytest.approx(expected, rel=1e-4)


def test_spatial_features_are_what_a_hook_sees(features, inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    plain = FeatureExtractorInceptionV3("plain", ["2048", "logits_unbiased"], str(inception_weights))
    seen = []
    plain.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with torch.no_grad():
        pooled, logits = plain(GENERATED)
    assert seen[0].shape == (N, 192, 17, 17)
    torch.testing.assert_close(features.spatial, seen[0][:, :7].reshape(N, 7 * 17 * 17), rtol=0, atol=0)
    torch.testing.assert_close(features.pooled, pooled, rtol=0, atol=0)
    torch.testing.assert_close(features.logits, logits, rtol=0, atol=0)
    assert features.spatial.shape[1] == 2023


def test_extractor_serves_torch_fidelitys_api(inception_weights, features):
    from torch_fidelity.utils import create_feature_extractor

    from edadm.metrics.inception_network import EXTRACTOR_NAME, extractor_class

    extractor_class()
    extractor = create_feature_extractor(
        EXTRACTOR_NAME, ["spatial"], cuda=False, feature_extractor_weights_path=str(inception_weights), verbose=False
    )
    (spatial,) = extractor(GENERATED[:2])
    torch.testing.assert_close(spatial, features.spatial[:2], rtol=1e-4, atol=1e-5)  # another batch size
    assert extractor.get_default_feature_layer_for_metric("fid") == "2048"


def test_streamed_reference_equals_the_statistics_of_all_features(reference):
    x = reference.features.double().numpy()
    np.testing.assert_allclose(reference.pooled.mean, x.mean(0), rtol=1e-9)
    np.testing.assert_allclose(reference.pooled.covariance, np.cov(x, rowvar=False), atol=1e-12)
    assert reference.n == N + 1 and reference.spatial.mean.shape == (2023,)


def fake(n: int, seed: int = 0) -> InceptionFeatures:
    generator = torch.Generator().manual_seed(seed)
    return InceptionFeatures(
        torch.rand(n, 6, generator=generator),
        torch.rand(n, 5, generator=generator),
        torch.rand(n, 4, generator=generator),
    )


def fake_reference(n: int = 30, keep: bool = True) -> InceptionReference:
    features = fake(n, seed=1)
    x, s = features.pooled.double().numpy(), features.spatial.double().numpy()
    pooled = Statistics(x.mean(0), np.cov(x, rowvar=False), n)
    spatial = Statistics(s.mean(0), np.cov(s, rowvar=False), n)
    return InceptionReference(pooled, spatial, features.pooled if keep else None, n, "fake", "a" * 64)


def test_kid_is_the_unbiased_estimate_of_its_kernel():
    found, _ = inception.kid(fake(12), fake_reference(12), subset_size=12)  # every subset holds all images
    x, y = fake(12).pooled.double().numpy(), fake(12, seed=1).pooled.double().numpy()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    off = ~np.eye(12, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_precision_and_recall_count_neighbours():
    features, reference = fake(20), fake_reference(25)
    x, y = features.pooled.double(), reference.features.double()

    def share(points, support):  # of points within the third-neighbour radius of any support point
        radius = torch.cdist(support, support).kthvalue(4, dim=1).values
        return float((torch.cdist(points, support) <= radius).any(1).double().mean())

    precision, recall = inception.precision_recall(features, reference)
    assert precision == pytest.approx(share(x, y)) and recall == pytest.approx(share(y, x))


def test_inception_score_is_that_of_the_formula():
    features = fake(20)
    order = np.random.RandomState(2020).permutation(20)
    p = features.logits.double().softmax(1).numpy()[order]
    scores = [np.exp((c * np.log(c / c.mean(0))).sum(1).mean()) for c in np.split(p, 10)]
    assert inception.inception_score(features) == pytest.approx((np.mean(scores), np.std(scores)))


@pytest.mark.parametrize(
    ("measure", "n", "reason"),
    [
        (inception.fid, 1, "at least 2 images, got 1"),
        (inception.sfid, 1, "at least 2 images, got 1"),
        (inception.kid, 999, "at least 1000 images on both sides, got 999 and 30"),
        (inception.precision_recall, 3, "at least 4 images on both sides, got 3"),
        (lambda features, reference: inception.inception_score(features), 9, "got 9"),
    ],
)
def test_too_few_images_are_not_available(measure, n, reason):
    with pytest.raises(NotAvailable, match=reason):
        measure(fake(n), fake_reference())


def test_a_reference_without_features_has_no_kid():
    with pytest.raises(NotAvailable, match="keep_features=True"):
        inception.kid(fake(12), fake_reference(keep=False), subset_size=5)


def test_misspelt_options_are_refused():
    assert inception.fidelity_options(kid_subset_size=5) == {"kid_subset_size": 5}
    with pytest.raises(ValueError, match="kid_subset_sise"):
        inception.fidelity_options(kid_subset_sise=5)


def test_references_survive_a_round_trip(tmp_path):
    reference = fake_reference()
    inception.save_reference(reference, tmp_path / "new" / "reference.npz")
    again = inception.load_reference(tmp_path / "new" / "reference.npz")
    assert (again.n, again.name, again.sha256) == (30, "fake", "a" * 64)
    np.testing.assert_array_equal(again.spatial.covariance, reference.spatial.covariance)
    assert torch.equal(again.features, reference.features)
    assert inception.fid(fake(20), again) == inception.fid(fake(20), reference)


def test_foreign_statistics_are_read_with_a_warning(tmp_path, caplog):
    reference = fake_reference()
    np.savez(tmp_path / "adm.npz", mu=reference.pooled.mean, sigma=reference.pooled.covariance)
    with caplog.at_level(logging.WARNING):
        again = inception.load_reference(tmp_path / "adm.npz")
    assert "does not say" in caplog.text
    assert (again.n, again.name, again.sha256) == (0, "adm", None)
    with pytest.raises(NotAvailable, match="mu_s"):
        inception.sfid(fake(5), again)


@pytest.mark.parametrize("fields", [None, {"mu": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.zeros((2, 2))}])
def test_broken_statistics_are_named(tmp_path, fields):
    path = tmp_path / "broken.npz"
    if fields is None:
        path.write_bytes(b"PK nonsense")
    else:
        np.savez(path, **fields)
    with pytest.raises(EdadmError, match=r"broken\.npz"):
        inception.load_reference(path)


@pytest.fixture
def counting(monkeypatch, inception_network):
    """A network stand-in that counts its passes: the cache is tested without Inception's cost."""
    passes = []

    def forward(rows, network):
        passes.append(len(rows))
        x = rows.float().flatten(1)[:, :6]
        return x, x[:, :5], x[:, :4]

    monkeypatch.setattr(inception, "_forward", forward)
    return passes


def test_references_are_cached_by_content(folders, tmp_path, counting, inception_network, caplog):
    build = lambda **options: inception.reference_from(folders[1], inception_network, cache=tmp_path, **options)
    first = build()
    assert first.n == N + 1 and first.name == "real" and len(counting) == 1
    again = build()
    assert len(counting) == 1 and np.array_equal(again.pooled.mean, first.pooled.mean)
    assert build(keep_features=True).features is not None and len(counting) == 2
    (cached,) = [p for p in tmp_path.iterdir() if p.stat().st_size < 3000]
    cached.write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        build()
    assert len(counting) == 3 and "built again" in caplog.text


def test_other_images_under_the_same_name_get_another_entry(tmp_path, counting, inception_network):
    for seed in (1, 2):
        write_folder(random_images(4, 8, seed), tmp_path / "set")
        inception.reference_from(tmp_path / "set", inception_network, cache=tmp_path / "cache")
    assert len(counting) == 2 and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_registered_data_set_is_a_reference(tmp_path, counting, inception_network, monkeypatch):
    from torch_fidelity.registry import DATASETS_REGISTRY

    monkeypatch.setitem(DATASETS_REGISTRY, "toy-train", lambda root, download: list(REAL))
    found = inception.reference_from("toy-train", inception_network, cache=tmp_path, datasets_root=tmp_path)
    assert (found.name, found.n) == ("toy-train", N + 1)


def test_absent_data_sets_and_folders_are_named(tmp_path, inception_network):
    with pytest.raises(EdadmError, match="no data set cifar10-train in"):
        inception.reference_from("cifar10-train", inception_network, cache=tmp_path, datasets_root=tmp_path / "none")
    with pytest.raises(EdadmError, match="one of cifar10-train"):
        inception.reference_from(tmp_path / "missing", inception_network, cache=tmp_path)


def test_a_reference_of_other_weights_is_refused(tmp_path, inception_network):
    inception.save_reference(fake_reference(), tmp_path / "x.npz")
    with pytest.raises(EdadmError, match="build it again"):
        inception.reference_from(tmp_path / "x.npz", inception_network)


def test_broken_and_unequal_images_of_a_reference_are_named(tmp_path, counting, inception_network):
    write_folder(random_images(2, 8), tmp_path / "set")
    write_folder(random_images(1, 9), tmp_path / "set", start=2)
    with pytest.raises(EdadmError, match=r"000002\.png has shape"):
        inception.reference_from(tmp_path / "set", inception_network, cache=tmp_path)
    (tmp_path / "set" / "000001.png").write_bytes(b"broken")
    with pytest.raises(EdadmError, match=r"000001\.png"):
        inception.reference_from(tmp_path / "set", inception_network, cache=tmp_path)
