"""How far an exported network is from the one that it was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import ensure_tuple_rep
from torch import Tensor

from evaluation.inferers import to_labels
from networks.training.provenance import plain
from transforms import InputError

# Of the greatest logit; and of the masks.
LARGEST_DIFFERENCE, LEAST_DICE = 1e-3, 0.999


def parity_inputs(description: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Five inputs of three sizes: the network's own, once for two images; odd and smaller; larger and of other form.

    They are smooth fields with noise in the range of values that the description gives, the same each time.

    Example:
        >>> image = {"channels": 1, "size": [8, 8], "value_range": [0, 1]}
        >>> [one.shape for one in parity_inputs({"input": image})]
        [(1, 1, 8, 8), (1, 1, 8, 8), (2, 1, 8, 8), (1, 1, 5, 7), (1, 1, 12, 9)]
    """
    about = description["input"]
    height, width = ensure_tuple_rep(about["size"], 2)
    low, high = about["value_range"] if len(about["value_range"]) == 2 else (0, 1)
    smaller = [max(about.get("smallest", 1), side | 1) for side in (height // 2, 7 * width // 8)]
    sizes = [(height, width)] * 3 + [(smaller[0], smaller[1]), (3 * height // 2, width + 1)]
    random = torch.Generator().manual_seed(0)
    for batch, size in zip((1, 1, 2, 1, 1), sizes, strict=True):
        coarse = torch.rand(batch, about["channels"], 5, 5, generator=random)
        smooth = F.interpolate(coarse, size, mode="bicubic", align_corners=True)
        noise = torch.randn(smooth.shape, generator=random)
        yield (low + (high - low) * (smooth + 0.05 * noise).clamp(0, 1)).numpy()


@torch.no_grad()
def compare(
    network: Callable[[Tensor], Tensor], exported: Callable[[np.ndarray], np.ndarray], description: Mapping[str, Any]
) -> dict[str, Any]:
    """How far two forms of a network are apart: logits and masks on `parity_inputs`.

    Returns:
        inputs: for each its shape, largest_difference of the logits, relative (to the greatest logit), dice (of the
        class whose masks agree least), foreground (share of pixels); and largest_difference, relative, dice, passed.

    Example:
        >>> about = {"input": {"channels": 1, "size": [8, 8], "value_range": [0, 1]}}
        >>> report = compare(lambda x: x - 0.5, lambda x: x - 0.4, about)
        >>> round(report["largest_difference"], 3), report["passed"]
        (0.1, False)
    """
    rows: list[dict[str, Any]] = []
    for images in parity_inputs(description):
        expected = network(torch.from_numpy(images))
        found = torch.from_numpy(np.asarray(exported(images)))
        if found.shape != expected.shape:
            fact = f"the exported network answers {tuple(found.shape)}, this one {tuple(expected.shape)}"
            raise InputError(f"not written: for an input {images.shape} {fact}")
        difference = float((found - expected).abs().max())
        greatest = float(expected.abs().max())
        masks = to_labels(expected), to_labels(found)
        rows.append(
            {
                "shape": [*images.shape],
                "largest_difference": difference,
                "relative": difference / greatest if greatest else difference,
                "dice": _dice(*masks),
                "foreground": float((masks[0] > 0).double().mean()),
            }
        )
    worst: dict[str, float] = {name: max(row[name] for row in rows) for name in ("largest_difference", "relative")}
    worst["dice"] = min(row["dice"] for row in rows)
    finite = all(math.isfinite(row["largest_difference"]) for row in rows)
    passed = finite and worst["relative"] <= LARGEST_DIFFERENCE and worst["dice"] >= LEAST_DICE
    return plain({**worst, "passed": passed, "inputs": rows})


def _dice(expected: Tensor, found: Tensor) -> float:
    """Dice of the class whose masks agree least; 1 where a class is in neither."""
    scores = [1.0]
    for label in torch.cat([expected.flatten(), found.flatten()]).unique().tolist():
        first, second = expected == label, found == label
        scores.append(2 * float((first & second).sum()) / float(first.sum() + second.sum()))
    return min(scores)


def parity_line(report: Mapping[str, Any]) -> str:
    """A comparison in one line.

    Example:
        >>> rows = [{"shape": [1, 3, 8, 8], "foreground": 0.0}]
        >>> numbers = {"largest_difference": 1e-6, "relative": 2e-7, "dice": 1.0, "passed": True}
        >>> parity_line({"file": "a.onnx", **numbers, "inputs": rows})
        'a.onnx: largest difference of logits 1e-06 (2e-07 of the greatest), Dice of masks 1.00000, on 1 inputs of 1
        sizes; all masks are empty'
    """
    rows = report["inputs"]
    sizes = {tuple(row["shape"][2:]) for row in rows}
    shares = [row["foreground"] for row in rows]
    vacuous = "; all masks are empty" if max(shares) == 0 else "; all masks are full" if min(shares) == 1 else ""
    return (
        f"{report['file']}: largest difference of logits {report['largest_difference']:.1g} ({report['relative']:.1g}"
        f" of the greatest), Dice of masks {report['dice']:.5f}, on {len(rows)} inputs of {len(sizes)} sizes{vacuous}"
    )
