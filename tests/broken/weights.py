"""Changes of weights, torch's and safetensors', and of the state that a training goes on from."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from tests.broken.arrays import as_npz, in_zip_part, zip_part
from tests.broken.changes import (
    ANY,
    EITHER,
    REFUSED,
    SAME,
    Change,
    Edit,
    any_file,
    at,
    damage,
    expecting,
    rewrite,
)


def weights(function: Callable[[dict[str, Any]], Any]) -> Edit:
    """Another content in a whole file of `torch.save`."""

    def edit(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        changed = function(state)
        torch.save(state if changed is None else changed, path)

    return edit


class _Code:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def _first(state: dict[str, Any]) -> str:
    """The name of a tensor of several numbers."""
    return next(name for name, tensor in state.items() if tensor.numel() > 8 and tensor.is_floating_point())


def tensor(function: Callable[[torch.Tensor], Any]) -> Edit:
    return weights(lambda state: {**state, _first(state): function(state[_first(state)])})


def one_weight(value: float) -> Edit:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return tensor(changed)


def floats(function: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return weights(lambda state: {k: function(v) if v.is_floating_point() else v for k, v in state.items()})


def _nested_in_itself(state: dict[str, Any]) -> dict[str, Any]:
    outer: dict[str, Any] = {}
    outer["state_dict"] = outer
    return outer


def _two_sets(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, **{f"module.{name}": tensor + 1 for name, tensor in state.items()}}


def _safetensors(path: Path) -> None:
    safetensors.torch.save_file(torch.load(path, weights_only=True), path)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": np.zeros(3)}))


def archive() -> list[Change]:
    """Damage to an archive of `torch.save`."""
    return [
        *any_file(),
        *damage(),
        Change("a bit flipped in a tensor", in_zip_part("data/0"), REFUSED),
        Change("a sign flipped in a tensor", in_zip_part("data/3", 1, 7), REFUSED),
        Change("a bit flipped in the pickle", in_zip_part("data.pkl"), REFUSED),
        Change("half a tensor", zip_part("data/0", lambda data: data[: len(data) // 2]), REFUSED),
        Change("a tensor of no bytes", zip_part("data/0", lambda data: b""), REFUSED),
        Change("half a pickle", zip_part("data.pkl", lambda data: data[: len(data) // 2]), REFUSED),
        Change("a list", weights(lambda state: list(state.values())), REFUSED),
        Change("a tensor alone", weights(lambda state: torch.zeros(3)), REFUSED),
        Change("nothing in it", weights(lambda state: {}), REFUSED),
        Change("nested in itself", weights(_nested_in_itself), REFUSED),
        Change("code", weights(lambda state: {"a": _Code()}), REFUSED),
        Change("code under a usual key", weights(lambda state: {"state_dict": state, "hook": _Code()}), REFUSED),
        Change("a whole module", lambda path: torch.save(torch.nn.Conv2d(3, 1, 1), path), REFUSED),
        Change("a pickle", _pickled, REFUSED),
        Change("an npz by another name", as_npz, REFUSED),
    ]


def checkpoints() -> list[Change]:
    """Of weights that must all be there to evaluate or predict."""
    return [
        *archive(),
        Change("all NaN", floats(lambda t: t * torch.nan), REFUSED),
        Change("one NaN", one_weight(torch.nan), REFUSED),
        Change("one Inf", one_weight(torch.inf), REFUSED),
        Change("integers", floats(lambda t: t.to(torch.int32)), REFUSED),
        Change("complex", floats(lambda t: t.to(torch.complex64)), REFUSED),
        Change("booleans", floats(lambda t: t > 0), REFUSED),
        Change("8 bits", floats(lambda t: t.to(torch.float8_e4m3fn)), ANY),
        Change("too large for float32", one_weight_in_64_bits, REFUSED),
        Change("float64", floats(lambda t: t.double()), SAME),
        Change("a sparse tensor", tensor(lambda t: t.to_sparse()), EITHER),
        Change("a quantised tensor", tensor(_quantised), REFUSED),
        Change("a tensor without data", tensor(lambda t: t.to("meta")), REFUSED),
        Change("an expanded tensor", tensor(lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape)), ANY),
        Change(
            "a tensor missing", weights(lambda state: {k: v for k, v in state.items() if k != _first(state)}), REFUSED
        ),
        Change("a tensor too many", weights(lambda state: {**state, "other.weight": torch.zeros(2)}), REFUSED),
        Change("a tensor of another shape", tensor(lambda t: torch.cat([t, t])), REFUSED),
        Change("a tensor of no numbers", tensor(lambda t: t[:0]), REFUSED),
        Change("a word for a tensor", tensor(lambda t: "weight"), REFUSED),
        Change("nothing for a tensor", tensor(lambda t: None), REFUSED),
        Change("numbers for names", weights(lambda state: dict(enumerate(state.values()))), REFUSED),
        Change("another network", lambda path: torch.save(torch.nn.Conv2d(3, 1, 1).state_dict(), path), REFUSED),
        Change("two sets of weights", weights(_two_sets), REFUSED),
        Change("under a usual key", weights(lambda state: {"state_dict": state, "epoch": 3}), SAME),
        Change("with prefixes", weights(lambda state: {f"module.{k}": v for k, v in state.items()}), SAME),
        Change("in torch's old format", weights_in_old_format, SAME),
        Change("safetensors by another name", _safetensors, EITHER),
    ]


def one_weight_in_64_bits(path: Path) -> None:
    floats(lambda t: t.double())(path)
    one_weight(1e300)(path)


def _quantised(values: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)


def weights_in_old_format(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def _tensors(function: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    return lambda path: safetensors.torch.save_file(function(safetensors.torch.load_file(path)), path)


def _tensor_header(function: Callable[[bytes], bytes]) -> Edit:
    """Another JSON header of a safetensors file, its length put right."""

    def edit(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = function(data[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return rewrite(edit)


def safe_tensors() -> list[Change]:
    """Without checksum: a bit flipped in the numbers cannot be told."""
    return [
        *any_file(),
        *expecting(damage(flips=ANY, blocks=ANY, end=ANY), {"first byte flipped": REFUSED, "cut by one byte": REFUSED}),
        Change("a header of 2⁶² bytes", rewrite(at(0, "<Q", 2**62)), REFUSED),
        Change("a header that is no JSON", _tensor_header(lambda text: b"x" * len(text)), REFUSED),
        Change("a header of a list", _tensor_header(lambda text: b"[1, 2]"), REFUSED),
        Change("an unknown dtype", _tensor_header(lambda text: text.replace(b'"F32"', b'"F33"', 1)), REFUSED),
        Change("a shape that claims more", _tensor_header(lambda text: text.replace(b"[4,", b"[400000,", 1)), REFUSED),
        Change(
            "all NaN",
            _tensors(lambda s: {k: v * torch.nan if v.is_floating_point() else v for k, v in s.items()}),
            REFUSED,
        ),
        Change("integers", _tensors(lambda s: {k: v.to(torch.int32) for k, v in s.items()}), REFUSED),
        Change("a tensor missing", _tensors(lambda s: {k: v for k, v in s.items() if k != _first(s)}), REFUSED),
        Change("a tensor of another shape", _tensors(lambda s: {**s, _first(s): torch.zeros(7)}), REFUSED),
        Change(
            "torch's format by another name", lambda path: torch.save(safetensors.torch.load_file(path), path), EITHER
        ),
    ]


def states() -> list[Change]:
    """Of `last.pt`, which a training goes on from."""

    def within(key: str, function: Callable[[Any], Any]) -> Edit:
        return weights(lambda state: {**state, key: function(state[key])})

    def model(function: Callable[[torch.Tensor], Any]) -> Edit:
        return within("model", lambda state: {**state, _first(state): function(state[_first(state)])})

    def momentum(value: float) -> Edit:
        def changed(state: dict[str, Any]) -> dict[str, Any]:
            group = {**state["param_groups"][0], "lr": value}
            return {**state, "param_groups": [group]}

        return within("optimizer", changed)

    return [
        *archive(),
        *(Change(f"no {key}", weights(lambda state, key=key: {k: v for k, v in state.items() if k != key}), REFUSED)
          for key in ("model", "optimizer", "lr_scheduler", "position", "selection", "settings")),
        Change("weights alone", weights(lambda state: state["model"]), REFUSED),
        Change("a NaN in the model", model(lambda t: t * torch.nan), REFUSED),
        Change("a tensor of another shape", model(lambda t: torch.cat([t, t])), REFUSED),
        Change("a learning rate of NaN", momentum(float("nan")), REFUSED),
        Change("a learning rate of words", momentum("fast"), REFUSED),  # type: ignore[arg-type]
        Change("an epoch in words", within("position", lambda p: {**p, "epoch": "two"}), REFUSED),
        Change("−2 epochs", within("position", lambda p: {**p, "epoch": -2}), REFUSED),
        Change("all epochs done", within("position", lambda p: {**p, "epoch": 20}), REFUSED),
        Change("selection of a word", within("selection", lambda s: "best"), REFUSED),
        # the next finite score is the best then
        Change("a best score of NaN", within("selection", lambda s: {**s, "best": float("nan")}), ANY),
    ]  # fmt: skip
