"""CKA and CCA against their definitions in float64, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml import similarity

cka, cca = jax.jit(similarity.cka), jax.jit(similarity.cca, static_argnums=2)


def made(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def pair(examples=60, features=6, others=4):
    """Two representations that share some of what they say, with features of unequal sizes."""
    x = made(examples, features) * np.logspace(0, -1.5, features)
    return x + 3.0, x[:, :others] + 0.3 * made(examples, others, seed=1)


def single(*arrays):
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def by_gram_matrices(x, y):
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with K = XXᵀ, L = YYᵀ: arXiv 1905.00414, Eqs. 3 and 4."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = (centre @ z @ z.T @ centre for z in (x, y))
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def by_qr(x, y, variance):
    """Singular values of QₓᵀQᵧ of the leading principal components."""
    bases = []
    for z in (x, y):
        z = z - z.mean(0)
        _, s, vt = np.linalg.svd(z, full_matrices=False)
        count = np.searchsorted(np.cumsum(s**2) / np.sum(s**2), variance) + 1
        bases.append(np.linalg.qr(z @ vt[:count].T)[0])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).mean()


def by_eigenvalues(x, y):
    """Roots of the eigenvalues of Σₓₓ⁻¹ΣₓᵧΣᵧᵧ⁻¹Σᵧₓ: the textbook's canonical correlations, of all directions."""
    x, y = x - x.mean(0), y - y.mean(0)
    matrix = np.linalg.solve(x.T @ x, x.T @ y) @ np.linalg.solve(y.T @ y, y.T @ x)
    squares = np.sort(np.linalg.eigvals(matrix).real)[::-1][: min(x.shape[1], y.shape[1])]
    return np.sqrt(squares).mean()


@pytest.mark.parametrize("shapes", [(60, 6, 4), (60, 3, 7), (8, 20, 30)])
def test_cka_is_that_of_gram_matrices(shapes):
    x, y = pair(*shapes) if shapes[1] > shapes[2] else (made(*shapes[:2]), made(shapes[0], shapes[2], seed=1))
    assert cka(*single(x, y)) == pytest.approx(by_gram_matrices(x, y), rel=1e-5)


@pytest.mark.parametrize("variance", [0.8, 0.99])
def test_cca_is_that_of_leading_components(variance):
    x, y = pair()
    assert by_qr(x, y, variance) != pytest.approx(by_qr(x, y, 1 - 1e-12), rel=1e-3)
    assert cca(*single(x, y), variance) == pytest.approx(by_qr(x, y, variance), rel=1e-5)


def test_cca_of_all_directions_is_the_textbook_s():
    x, y = pair()
    assert cca(*single(x, y), 1.0) == pytest.approx(by_eigenvalues(x, y), rel=1e-5)


def test_small_directions_count_where_all_do():
    x, y = pair()
    x[:, 0] *= 1e-4  # 1e-8 of the variance, which a sum from the largest on would lose
    assert cca(*single(x - x.mean(0), y), 1.0) == pytest.approx(by_eigenvalues(x, y), rel=1e-3)


def test_positions_of_images_are_examples():
    x, y = made(5, 4, 3, 6), made(5, 4, 3, 2, seed=1)
    flat = x.reshape(-1, 6), y.reshape(-1, 2)
    assert cka(*single(x, y)) == pytest.approx(by_gram_matrices(*flat), rel=1e-5)
    assert cca(*single(x, y)) == pytest.approx(by_qr(*flat, 0.99), rel=1e-5)


def test_rotation_scale_and_shift_change_no_cka_and_a_linear_map_does():
    x, y = pair()
    rotation = np.linalg.qr(made(6, 6, seed=2))[0]
    before = float(cka(*single(x, y)))
    assert cka(*single(1e7 * x @ rotation - 5.0, y)) == pytest.approx(before, rel=1e-5)
    assert cka(*single(x, 1e-7 * y)) == pytest.approx(before, rel=1e-5)
    assert cka(*single(x * np.arange(1, 7), y)) != pytest.approx(before, rel=0.01)


def test_an_invertible_map_changes_no_cca():
    x, y = pair()
    before = float(cca(*single(x, y), 1.0))
    assert cca(*single(x @ made(6, 6, seed=2) + 1.0, y), 1.0) == pytest.approx(before, rel=1e-4)
    assert cca(*single(x, y @ made(4, 4, seed=3)), 1.0) == pytest.approx(before, rel=1e-4)


def test_equal_is_one_and_independent_is_nothing():
    x, y = single(made(4000, 5), made(4000, 5, seed=1))
    for of in (cka, cca):
        assert of(x, x) == pytest.approx(1, abs=1e-5)
        assert of(x, y) < 0.05
        assert of(x, x) <= 1 + 1e-6


def test_repeated_and_dead_features_count_as_nothing():
    x, y = pair()
    rank = np.concatenate([x, x[:, :2] - x[:, 2:4], np.zeros((60, 1))], 1)
    assert cca(*single(rank, y), 1.0) == pytest.approx(by_eigenvalues(x, y), rel=1e-4)
    assert cca(*single(rank, y)) == pytest.approx(by_qr(rank, y, 0.99), rel=1e-5)
    assert cka(*single(rank, y)) == pytest.approx(by_gram_matrices(rank, y), rel=1e-5)


@pytest.mark.parametrize("value", [1.0, 0.1])  # the mean of sixty times a tenth is not a tenth
def test_a_constant_representation_has_no_answer(value):
    x, y = single(np.full((60, 6), value), pair()[1])
    assert jnp.isnan(cka(x, y))
    assert jnp.isnan(cca(x, y))
    assert jnp.isnan(cka(x, x))


def test_numbers_of_few_digits_and_a_large_constant_beside_others():
    x = jnp.asarray(1 + 0.01 * made(60, 4), jnp.bfloat16)
    assert cka(x, x) == pytest.approx(1, abs=1e-5)
    beside = np.concatenate([made(60, 4), np.full((60, 1), 1e7)], 1)
    assert cka(*single(beside, made(60, 4))) == pytest.approx(1, abs=1e-5)


def test_both_can_be_mapped():
    x, y = single(made(3, 60, 6), made(3, 60, 4, seed=1))
    for of in (cka, cca):
        together = jax.jit(jax.vmap(of))(x, y)
        np.testing.assert_allclose(together, [of(a, b) for a, b in zip(x, y, strict=True)], rtol=1e-5)


def test_what_has_no_answer_is_refused():
    x, y = single(*pair())
    with pytest.raises(ValueError, match="y: 59 examples, and x has 60; give the same"):
        cka(x, y[:-1])
    with pytest.raises(ValueError, match="2 examples, whose CKA is always 1; give 3"):
        cka(x[:2], y[:2])
    with pytest.raises(ValueError, match="10 examples of 6 and 4 features.* give 11 or more"):
        cca(x[:10], y[:10])
    with pytest.raises(ValueError, match="variance=1.5: give"):
        cca(x, y, 1.5)
