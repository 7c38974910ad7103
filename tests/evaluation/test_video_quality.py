import numpy as np
import pytest

from jaxvp.evaluation.video_quality import psnr, ssim


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(20, 230, (2, 16, 12, 3), np.uint8)


def test_psnr_closed_form(images):
    np.testing.assert_allclose(psnr(images + 5, images), 20 * np.log10(255 / 5))
    assert psnr(images, images).min() > 60


def test_ssim_by_a_direct_sum(images):
    other = np.clip(images + np.random.default_rng(1).normal(0, 30, images.shape), 0, 255)
    other = other.astype(np.uint8)
    taps = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    window = np.outer(taps, taps)[..., None] / np.outer(taps, taps).sum()
    scores = []
    for i in range(16 - 10):
        for j in range(12 - 10):
            x, y = (a[0, i:i + 11, j:j + 11].astype(float) for a in (other, images))
            mx, my = (window * x).sum((0, 1)), (window * y).sum((0, 1))
            vx, vy = (window * x * x).sum((0, 1)) - mx**2, (window * y * y).sum((0, 1)) - my**2
            cov = (window * x * y).sum((0, 1)) - mx * my
            scores.append((2 * mx * my + 6.5025) * (2 * cov + 58.5225)
                          / ((mx**2 + my**2 + 6.5025) * (vx + vy + 58.5225)))
    assert ssim(other, images)[0] == pytest.approx(np.mean(scores), abs=1e-6)
    assert ssim(images, images) == pytest.approx([1.0, 1.0])


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(np.zeros((8, 32, 3), np.uint8), np.zeros((8, 32, 3), np.uint8))
