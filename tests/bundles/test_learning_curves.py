"""Each bundle's loss, optimiser and schedule, taken from its configuration and run by MONAI's trainer, against a plain
PyTorch loop written from the published recipe.

In float64, since training multiplies rounding errors: in float32 a tolerance that lets two right loops pass would let a
slightly wrong one pass too.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.handlers import from_engine
from torch import Tensor, nn

from tests.bundles.conftest import parsed

Loss = Callable[[Tensor, Tensor], Tensor]
EPOCHS, BATCHES = 10, 3
STEPS = EPOCHS * BATCHES
VMUNET = {"dims": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1, 1], "d_state": 4}


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)


def poly(step: int) -> float:
    """The rate after step i is 0.01 · (1 − i / I)^0.9; before any step it is 0.01."""
    return 0.01 if step == 0 else 0.01 * (1 - (step - 1) / STEPS) ** 0.9


def cosine(period: int) -> Callable[[int], float]:
    return lambda step: 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * (step // BATCHES) / period)) / 2


def binary(ce_weight: float, smooth: float) -> Loss:
    def loss(logits: Tensor, g: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        dice = (2 * (p * g).sum((1, 2, 3)) + smooth) / (p.sum((1, 2, 3)) + g.sum((1, 2, 3)) + smooth)
        return ce_weight * F.binary_cross_entropy(p, g) + (1 - dice).mean()

    return loss


def multi_class(ce_weight: float, smooth: float) -> Loss:
    def loss(logits: Tensor, label: Tensor) -> Tensor:
        p, g = torch.softmax(logits, 1), F.one_hot(label[:, 0].long(), logits.shape[1]).movedim(-1, 1).double()
        overlap, total = (p * g).sum((0, 2, 3)), (p * p).sum((0, 2, 3)) + (g * g).sum((0, 2, 3))
        dice = (2 * overlap + smooth) / (total + smooth)
        return ce_weight * -(g * torch.log(p)).sum(1).mean() + (1 - dice).mean()

    return loss


class Recipe(NamedTuple):
    bundle: str
    network: dict[str, Any]
    channels: int
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    rate: Callable[[int], float]
    loss: Loss


RECIPES = [
    Recipe("cmunext_busi", {"_target_": "networks.cmunext_s"}, 3, sgd, poly, binary(0.5, 1e-5)),
    Recipe("vmunet_isic", {"_target_": "networks.VMUNet", **VMUNET}, 3, adamw, cosine(50), binary(1, 1)),
    Recipe(
        "vmunet_synapse",
        {"_target_": "networks.VMUNet", "out_channels": 9, **VMUNET},
        1,
        adamw,
        cosine(100),
        multi_class(1, 1e-5),
    ),
]


def batches(recipe: Recipe) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(BATCHES):
        smooth = F.avg_pool2d(torch.randn(4, 1, 40, 40, generator=generator), 9, 1)
        several = recipe.bundle == "vmunet_synapse"
        label = (40 * smooth.abs()).floor().clamp(0, 8) if several else (smooth > 0.05).float()
        image = torch.randn(4, recipe.channels, 32, 32, generator=generator) + label
        made.append({"image": image.double(), "label": label.double()})
    return made


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.bundle)
def test_the_bundle_learns_as_the_published_recipe_does(recipe: Recipe) -> None:
    data = batches(recipe)
    parser = parsed(recipe.bundle, network_def=recipe.network, max_epochs=EPOCHS, device="cpu")
    parser.globals["batches"] = data
    parser["train"]["dataloader"] = "$batches"
    # what steps the schedule; the other handlers report
    handlers = parser["train"]["handlers"]
    parser["train"]["handlers"] = [one for one in handlers if one["_target_"] == "LrScheduleHandler"]
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def").double()
    plain = copy.deepcopy(network)
    trainer = parser.get_parsed_content("train#trainer")

    losses: list[float] = []
    loss_of = from_engine(["loss"], first=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(float(loss_of(trainer.state.output))))
    torch.manual_seed(3)
    trainer.run()

    # what drops paths
    torch.manual_seed(3)
    plain.train()
    optimizer = recipe.optimizer(plain)
    expected = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        batch = data[step % BATCHES]
        loss = recipe.loss(plain(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, abs=1e-5, rel=0)
    assert losses[-1] < 0.95 * losses[0]
    for (name, trained), other in zip(network.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(trained, other, atol=1e-5, rtol=0, msg=name)
