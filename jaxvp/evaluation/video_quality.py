"""How close predicted video is to what happened: PSNR and SSIM."""

import cv2
import numpy as np


def psnr(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, one number per image: uint8[..., H, W, 3] -> float64[...].

    Equal images have no finite ratio; an error of a tenth of a grey level stands for them (68 dB).
    """
    error = np.square(predicted.astype(np.float64) - truth.astype(np.float64)).mean((-3, -2, -1))
    return 10 * np.log10(255.0**2 / np.maximum(error, 0.01))


def ssim(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004): uint8[..., H, W, 3] -> float64[...] in [-1, 1].

    Per colour channel with the paper's 11 x 11 Gaussian window (sigma 1.5), K1 = 0.01, K2 = 0.03,
    over the places where the whole window is inside the image; images are at least 11 x 11.
    """
    height, width = truth.shape[-3:-1]
    if min(height, width) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {height} x {width}")
    pairs = zip(predicted.reshape(-1, height, width, 3), truth.reshape(-1, height, width, 3),
                strict=True)
    return np.array([_ssim(a.astype(np.float64), b.astype(np.float64))
                     for a, b in pairs]).reshape(truth.shape[:-3])


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    def blur(image):
        return cv2.GaussianBlur(image, (11, 11), 1.5)[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    score = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
             / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    return float(score.mean())
