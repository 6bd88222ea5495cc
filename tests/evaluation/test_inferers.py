from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, list_data_collate
from monai.utils import ensure_tuple_rep
from numpy.typing import NDArray
from scipy import ndimage

from evaluation import FileEvaluator, ItemOrReason, SliceToVolume
from transforms import InputError


def network(classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, classes, 3, padding=1)
    return torch.nn.Sequential(*layers).eval()


def slice_loop(volume: NDArray[Any], net: torch.nn.Module, size: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The published evaluation, slice by slice with scipy: (logits (C, D, h, w), labels (D, H, W))."""
    logits, labels = [], []
    for image in volume:
        height, width = image.shape
        zoomed = ndimage.zoom(image, (size[0] / height, size[1] / width), order=3)
        with torch.no_grad():
            out = net(torch.from_numpy(zoomed).float()[None, None])[0]
        label = out.argmax(0).numpy() if len(out) > 1 else (torch.sigmoid(out[0]) > 0.5).numpy().astype(np.int64)
        logits.append(out.numpy())
        labels.append(ndimage.zoom(label, (height / size[0], width / size[1]), order=0))
    return np.stack(logits, 1), np.stack(labels)


def volume(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("classes", [1, 2, 9])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((7, 41, 53), (32, 32)), ((3, 32, 32), (32, 32)), ((5, 64, 24), 32), ((3, 41, 53), (33, 20)), ((2, 13, 17), None)],
)
def test_equal_to_a_loop_over_slices_with_scipy(
    classes: int, shape: tuple[int, int, int], size: tuple[int, int] | int | None
) -> None:
    net, image = network(classes), volume(shape)
    logits, labels = slice_loop(image, net, ensure_tuple_rep(size or shape[1:], 2))
    inputs = torch.from_numpy(image).float()[None, None]
    found = SliceToVolume(size, batch_size=3, output="logits")(inputs, net)
    np.testing.assert_allclose(found[0].numpy(), logits, atol=1e-4)
    found = SliceToVolume(size, batch_size=3)(inputs, net)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found[0, 0].numpy(), labels)
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("spatial_dim", [0, 1, 2])
def test_any_axis_can_be_sliced(spatial_dim: int) -> None:
    net, image = network(3), torch.from_numpy(volume((9, 10, 11))).float()
    expected = SliceToVolume((16, 16))(image.movedim(spatial_dim, 0)[None, None], net)[0, 0].movedim(0, spatial_dim)
    found = SliceToVolume((16, 16), spatial_dim=spatial_dim)(image[None, None], net)
    assert torch.equal(found[0, 0], expected)


def test_batches_of_volumes_keep_order_and_meta_data() -> None:
    items = []
    for i in range(2):
        image = MetaTensor(torch.from_numpy(volume((4, 20, 18), i)).float()[None], affine=np.diag([3.0, 2, 1, 1]))
        image.meta["filename_or_obj"] = f"case{i}.nii.gz"
        items.append({"image": image})
    net, inferer = network(2), SliceToVolume((16, 16), batch_size=3)
    batch = list_data_collate(items)["image"]
    for i, found in enumerate(decollate_batch(inferer(batch, net))):
        assert torch.equal(found.as_tensor(), inferer(items[i]["image"][None].as_tensor(), net)[0])
        assert found.meta["filename_or_obj"] == f"case{i}.nii.gz"
        np.testing.assert_array_equal(found.affine.numpy(), np.diag([3.0, 2, 1, 1]))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="volumes"):
        SliceToVolume()(torch.zeros(1, 1, 4, 4), network(1))
    for arguments, message in (
        ({"output": "masks"}, '"labels", "logits" or "probabilities"'),
        ({"spatial_dim": 3}, "spatial_dim"),
        ({"batch_size": 0}, "batch_size"),
        ({"spatial_size": (8, 8, 8)}, "length 2"),
    ):
        with pytest.raises(ValueError, match=message):
            SliceToVolume(**arguments)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
@pytest.mark.parametrize("in_network", [True, False])
def test_a_file_that_memory_cannot_hold_does_not_stop_the_rest(error: Exception, in_network: bool) -> None:
    def maybe(wanted: bool, found: bool) -> None:
        if wanted and found:
            raise error

    class Fails(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            maybe(in_network, image.max() > 1)
            return image

    def read(item: dict[str, Any]) -> dict[str, Any]:
        large = item["image"] == "b.png"
        maybe(not in_network, large)
        return {"image": MetaTensor(torch.full((1, 4, 4), 9.0 * large), meta={"filename_or_obj": item["image"]})}

    items = [{"image": name} for name in ("a.png", "b.png", "c.png")]
    seen: list[int] = []
    evaluator = FileEvaluator("cpu", DataLoader(Dataset(items, ItemOrReason(read))), Fails())
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(len(evaluator.state.output)))
    with pytest.raises(InputError, match=r"^1 of 3 files failed: b\.png: there is not enough memory for it"):
        evaluator.run()
    assert seen == [1, 0, 1]


@pytest.mark.parametrize("classes", [1, 4])
def test_probabilities_come_behind_the_same_labels(classes: int) -> None:
    net, inputs = network(classes), torch.from_numpy(volume((3, 20, 30))).float()[None, None]
    found = SliceToVolume(None, batch_size=2, output="probabilities")(inputs, net)
    assert found.dtype == torch.float16
    assert torch.equal(found[:, :1].to(torch.uint8), SliceToVolume(None)(inputs, net))
    logits = SliceToVolume(None, output="logits")(inputs, net)
    expected = logits.sigmoid() if classes == 1 else logits.softmax(1)[:, 1:]
    torch.testing.assert_close(found[:, 1:].float(), expected, atol=1e-3, rtol=0)
    zoomed = SliceToVolume((16, 16), output="probabilities")(inputs, net)
    assert zoomed.shape == (1, 1 + max(classes - 1, 1), 3, 20, 30)
    assert torch.equal(zoomed[:, :1].to(torch.uint8), SliceToVolume((16, 16))(inputs, net))
