"""How near pictures come to the true ones (PSNR, SSIM), and sets of clips to each other (Fréchet distance).

Frames are (t, y, x, 3) uint8 RGB. A perceptual distance and the features that a Fréchet distance is taken in come from
a FeatureExtractor; this knows only what to do with them.
"""

import numpy as np
from numpy.typing import NDArray

_LEAST_ERROR = 1 / 12  # the variance of rounding to 8 bits; equal frames would be infinitely good
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_WINDOW, _SIGMA = 11, 1.5  # of SSIM, pixels
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(frames: NDArray[np.uint8], true: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal to noise (t,) in dB of each frame; at most 58.9, where the error is that of rounding to 8 bits."""
    error = np.square(frames.astype(np.float64) - true).mean(axis=(1, 2, 3))
    return np.asarray(10 * np.log10(255.0**2 / np.maximum(error, _LEAST_ERROR)))


def ssim(frames: NDArray[np.uint8], true: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity (t,) of each frame's luma, at most 1 (Wang et al. 2004, equation 13).

    Gaussian windows of 11 × 11 pixels, σ = 1.5, that lie wholly inside the picture.
    """
    x, y = luma(frames), luma(true)
    blur_rows, blur_columns = (_gaussian(side) for side in x.shape[1:])

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(blur_rows @ values @ blur_columns.T)

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return np.asarray((light * (2 * covariance + _C2) / (variances + _C2)).mean(axis=(1, 2)))


def luma(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Brightness (t, y, x) of RGB frames, 0 to 255."""
    return np.asarray(frames @ np.array(_LUMA))


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The Fréchet distance between Gaussians fitted to features (n, d) and (m, d), each of two clips or more.

    |μa − μb|² + tr(Σa + Σb − 2·(Σa·Σb)^½) (Heusel et al. 2017, equation 6), with unbiased covariances. Fewer clips
    than dimensions are allowed: with Σ = RᵀR the last trace is the sum of the singular values of Ra·Rbᵀ, exactly, at
    any rank. Few clips make the distance too large, so compare distances over equally many clips only.
    """
    roots = [np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(len(x) - 1) for x in (a, b)]
    spread = sum(float(np.square(root).sum()) for root in roots)
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return float(np.square(a.mean(0) - b.mean(0)).sum()) + spread - 2 * shared


def _gaussian(size: int) -> NDArray[np.float64]:
    """(size − 10, size) weights of the window at each place where it lies inside."""
    window = np.exp(-0.5 * np.square((np.arange(_WINDOW) - _WINDOW // 2) / _SIGMA))
    weights = np.zeros((size - _WINDOW + 1, size))
    for place, row in enumerate(weights):
        row[place : place + _WINDOW] = window / window.sum()
    return weights
