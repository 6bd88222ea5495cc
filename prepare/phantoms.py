"""Drawings that look a little like CT, ultrasound and dermoscopy: enough to learn from, nothing to learn about."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from transforms import BTCV_IDS, SYNAPSE_CLASSES

# Mean Hounsfield units in the portal venous phase; neighbours overlap once case-wise shifts and noise are added.
ORGAN_HU = {
    "liver": 100,
    "stomach": 40,
    "spleen": 130,
    "left kidney": 190,
    "right kidney": 190,
    "pancreas": 75,
    "gallbladder": 5,
    "aorta": 165,
}


def _organ_masks(x: np.ndarray, y: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Boolean masks, later ones in front; x, y, z in mm from the body's centre to left, posterior and superior."""

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        cx, cy, cz = np.asarray(centre) + rng.uniform(-3.5, 3.5, 3)
        rx, ry, rz = np.asarray(radii) * rng.uniform(0.9, 1.1, 3)
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < 1

    pancreas = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), bool)
    shift = rng.uniform(-3.5, 3.5, 3)
    for t in np.linspace(0, 1, 15):
        # Head beside the duodenum, body across the aorta, tail towards the spleen.
        cx, cy, cz = np.array((-32 + 108 * t, -2 - 30 * np.sin(np.pi * t) + 22 * t, -26 + 44 * t)) + shift
        pancreas |= (x - cx) ** 2 + (y - cy) ** 2 + (0.8 * (z - cz)) ** 2 < (19 - 6 * t) ** 2
    ax, ay = np.array((12, 36)) + rng.uniform(-3, 3, 2)
    return {
        "liver": ellipsoid((-72, -12, 22), (84, 78, 62)) | ellipsoid((-10, -55, 32), (62, 38, 34)),
        "stomach": ellipsoid((56, -48, 32), (46, 36, 40)),
        "spleen": ellipsoid((112, 28, 34), (30, 46, 44)),
        "left kidney": ellipsoid((70, 52, -22), (27, 30, 52)),
        "right kidney": ellipsoid((-66, 54, -30), (27, 30, 52)),
        "pancreas": pancreas,
        "gallbladder": ellipsoid((-52, -60, -20), (23, 27, 32)),
        "aorta": (x - ax) ** 2 + (y - ay) ** 2 < rng.uniform(12, 14) ** 2,
    }


def ct_phantom(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """One abdomen: (Hounsfield units int16, BTCV label ids uint8), both (D, H, W) in axis codes SPL.

    Args:
        rng: draws size, position, outlines and noise.
        shape: (D, H, W).
        spacing_mm: of the voxels, in the order (D, H, W).

    Example:
        >>> hounsfield, label = ct_phantom(np.random.default_rng(0), (8, 32, 32), (18.0, 11.0, 11.0))
        >>> hounsfield.shape, set(BTCV_IDS) <= set(label.ravel().tolist())
        ((8, 32, 32), True)
    """
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    # Size and position of the body, then a smooth displacement of some millimetres for uneven outlines.
    scale = rng.uniform(0.95, 1.05)
    x, y, z = (x - rng.uniform(-8, 8)) / scale, (y - rng.uniform(-8, 8)) / scale, z - rng.uniform(-8, 8)
    waves = []
    for _ in range(3):
        phase, length = rng.uniform(0, 2 * np.pi, 3), rng.uniform(60, 110, 3)
        across, down, along = (
            np.sin(2 * np.pi * at / step + start) for at, step, start in zip((x, y, z), length, phase, strict=True)
        )
        waves.append(3.5 * across * down + 2 * along)
    x, y, z = x + waves[0], y + waves[1], z + waves[2]

    outline = (x / 168) ** 2 + (y / 118) ** 2
    cavity = outline < 0.76
    spine = (x**2 + (y - 66) ** 2 < 21**2) | ((np.abs(x) < 6) & (y > 66) & (y < 100))
    hounsfield = np.full(shape, -1000.0)
    hounsfield[outline < 1] = -100
    hounsfield[(outline < 0.86) & ~cavity] = 55
    vena_cava = (x + 18) ** 2 + (y - 36) ** 2 < 12**2
    hounsfield[vena_cava] = 130
    for _ in range(8):
        cx, cy, cz = rng.uniform(-95, 95), rng.uniform(-70, 20), rng.uniform(-80, -30)
        bowel = ((x - cx) / 18) ** 2 + ((y - cy) / 16) ** 2 + ((z - cz) / 18) ** 2 < 1
        hounsfield[bowel & cavity] = rng.uniform(25, 60)
    for side in (-1, 1):
        psoas = ((x - side * 38) / 20) ** 2 + ((y - 68) / 18) ** 2 < 1
        hounsfield[psoas] = 55

    label = np.zeros(shape, np.uint8)
    for organ, mask in _organ_masks(x, y, z, rng).items():
        mask = mask & cavity & ~spine
        label[mask] = BTCV_IDS[SYNAPSE_CLASSES.index(organ)]
        hounsfield[mask] = ORGAN_HU[organ] + rng.normal(0, 7)
    stomach = label == BTCV_IDS[SYNAPSE_CLASSES.index("stomach")]
    hounsfield[stomach & (y < -62)] = -700  # gas
    hounsfield[spine] = rng.uniform(230, 290)
    hounsfield[x**2 + (y - 92) ** 2 < 8**2] = 30  # spinal canal

    # In-plane blur for partial volume, then noise with a little correlation.
    hounsfield = ndimage.gaussian_filter(hounsfield, (0.3, 0.6, 0.6))
    hounsfield += ndimage.gaussian_filter(rng.normal(0, 32, shape), (0, 0.7, 0.7))
    return np.clip(hounsfield, -1024, 1500).round().astype(np.int16), label


def _blob(
    rng: np.random.Generator,
    shape: tuple[int, int],
    centre: tuple[float, float],
    radii: tuple[float, float],
    roughness: float,
) -> np.ndarray:
    """Signed field, (H, W), negative inside an ellipse with a wavy outline; centre and radii as shares of the sides."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    y, x = (rows / shape[0] - centre[0]) / radii[0], (columns / shape[1] - centre[1]) / radii[1]
    angle, limit = np.arctan2(y, x), np.ones(shape)
    for wave in range(2, 8):
        limit += roughness * rng.uniform(-1, 1) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(x, y) - limit


def ultrasound_phantom(
    rng: np.random.Generator, shape: tuple[int, int], malignant: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Layered tissue with speckle, one dark lesion and its shadow: (grey uint8, mask bool), both (H, W).

    Example:
        >>> grey, mask = ultrasound_phantom(np.random.default_rng(0), (64, 64), malignant=True)
        >>> bool(grey[mask].mean() < grey[~mask].mean())
        True
    """
    depth = np.linspace(0, 1, shape[0])[:, None]
    texture = ndimage.gaussian_filter(rng.normal(size=shape), (4, 12))
    texture /= texture.std()
    border = 0.27 + 0.03 * texture
    reflectivity = np.where(depth < border, 0.40, 0.62) + 0.06 * texture
    reflectivity[np.broadcast_to(depth < 0.05, shape)] = 0.95  # skin
    reflectivity[np.broadcast_to(depth > 0.88, shape)] = 0.45  # muscle
    centre = (rng.uniform(0.42, 0.58), rng.uniform(0.3, 0.7))
    radii = (rng.uniform(0.10, 0.17), rng.uniform(0.13, 0.22))
    mask = _blob(rng, shape, centre, radii, 0.10 if malignant else 0.03) < 0
    beam = ndimage.gaussian_filter1d(mask.mean(axis=0), 3)
    below = np.maximum.accumulate(mask, axis=0) & ~mask
    # Malignant lesions absorb, cysts and many benign ones let more through.
    reflectivity *= np.where(below, 1 + (-1.2 if malignant else 0.8) * beam, 1)
    reflectivity[mask] = 0.16 + 0.03 * texture[mask]
    speckle = np.hypot(*(ndimage.gaussian_filter(rng.normal(size=shape), (0.7, 1.4)) for _ in range(2)))
    echo = reflectivity.clip(0.02) * (0.35 + 0.65 * speckle / speckle.mean()) * np.exp(-0.5 * depth)
    grey = np.log1p(8 * ndimage.gaussian_filter(echo, 0.5)) / np.log(9) * 255
    return grey.clip(0, 255).astype(np.uint8), mask


def dermoscopy_phantom(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Skin with hairs, a vignette and one pigmented lesion: (RGB uint8 (H, W, 3), mask bool (H, W)).

    Example:
        >>> image, mask = dermoscopy_phantom(np.random.default_rng(0), (64, 64))
        >>> bool(image[mask].mean() < image[~mask].mean())
        True
    """
    height, width = shape
    skin = np.array([222.0, 178, 152]) + rng.normal(0, 10, 3)
    shade = ndimage.gaussian_filter(rng.normal(size=shape), height / 12)
    image = skin + (shade / shade.std())[..., None] * 4
    centre, radii = rng.uniform(0.4, 0.6, 2), rng.uniform(0.16, 0.33, 2)
    field = _blob(rng, shape, tuple(centre), tuple(radii), 0.07)
    mask = field < 0
    network = ndimage.gaussian_filter(rng.normal(size=shape), height / 100)
    pigment = np.array([112.0, 70, 48]) + rng.normal(0, 12, 3) + (network / network.std())[..., None] * 9
    opacity = 0.92 / (1 + np.exp(field / 0.05))
    image += opacity[..., None] * (pigment - image)
    for _ in range(rng.integers(2, 9)):
        start, end = rng.uniform(0, 1, (2, 2)) * shape
        bend = (start + end) / 2 + rng.normal(0, 0.15, 2) * shape
        t = np.linspace(0, 1, 4 * max(shape))[:, None]
        rows, columns = (((1 - t) ** 2) * start + 2 * t * (1 - t) * bend + t**2 * end).round().astype(int).T
        for shift in range(rng.integers(1, 3)):
            image[rows.clip(0, height - 1), (columns + shift).clip(0, width - 1)] = (58, 42, 36)
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image *= 1 - 0.25 * ((x**2 + y**2) / 2)[..., None] ** 2
    image = ndimage.gaussian_filter(image, (0.6, 0.6, 0)) + rng.normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask
