"""What the bundles' configurations ask of the run that reads them: where the bundle lies, and what it needs."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import save_net_with_metadata
from monai.networks import convert_to_torchscript
from torch import nn

from transforms import replacing

__all__ = ["export_torchscript", "prepare_run", "root"]

logger = logging.getLogger(__name__)

WORDS = {"true": True, "false": False, "null": None}


def root() -> str:
    """The folder of the bundle whose configuration is being read, absolute: the parent of `configs/`.

    A configuration does not know its own file. MONAI does: `python -m monai.bundle run` and `ckpt_export` hold it while
    they resolve the configuration, and this function looks for it up the call stack. So a bundle works from any working
    directory, and a copied folder stays a bundle of its own.

    Raises:
        ValueError: when a `ConfigParser` is used by itself, which knows no file; set `bundle_root` then.

    Example:
        >>> root()
        Traceback (most recent call last):
        ...
        ValueError: the configuration's file is not known here: set bundle_root, the folder that holds configs/
    """
    if workflow := _running_workflow():
        return str(_bundle_of(workflow.config_root_path))
    for frame in _callers():
        # the commands of monai.bundle.scripts that take configurations without a workflow
        if frame.f_globals.get("__name__") == "monai.bundle.scripts" and (files := frame.f_locals.get("config_file_")):
            return str(_bundle_of(Path(files if isinstance(files, str) else files[0]).parent))
    raise ValueError("the configuration's file is not known here: set bundle_root, the folder that holds configs/")


def prepare_run() -> None:
    """Reads the words of the command line as YAML would, and refuses what is asked for and not installed.

    `--train#trainer#amp false` arrives as the word "false", which Python takes for true: the words true, false and null
    become values. Every configuration calls this first in `initialize`.

    Raises:
        SystemExit: `--tracking mlflow` without mlflow.

    Example:
        >>> prepare_run()  # outside of a run there is nothing to prepare
    """
    workflow = _running_workflow()
    if workflow is None:
        return
    if _tracks_by_mlflow(workflow.parser) and not importlib.util.find_spec("mlflow"):
        raise SystemExit("--tracking mlflow needs MLflow: pip install mlflow-skinny sqlalchemy alembic")
    workflow.parser.config = _with_values(workflow.parser.config)
    workflow.parser.parse(reset=True)


def _with_values(config: Any) -> Any:
    """The configuration with the words true, false and null as values."""
    if isinstance(config, dict):
        return {key: _with_values(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_with_values(value) for value in config]
    return WORDS.get(config.lower(), config) if isinstance(config, str) else config


def export_torchscript(network: nn.Module, filepath: str | Path) -> None:
    """Writes the network of the run with its weights as TorchScript, with the configuration and metadata.json in it.

    Unlike MONAI's `ckpt_export` it takes a network whose weights have been checked, and the overrides of the run are in
    the configuration that it stores. `monai.data.load_net_with_metadata` reads all three.

    Args:
        network: the bare network.
        filepath: ends in `.ts`; the folder is made if need be.
    """
    workflow = _running_workflow()
    config = dict(workflow.parser.get()) if workflow else {}
    metadata = config.pop(ConfigParser.meta_key, {})
    path = Path(filepath)
    with replacing(path) as temporary:
        save_net_with_metadata(
            convert_to_torchscript(network),
            str(temporary),
            meta_values=metadata,
            more_extra_files={"inference.json": json.dumps(config).encode()},
        )
    logger.info(f"exported to {path.resolve()}")


def _running_workflow() -> ConfigWorkflow | None:
    workflows = (frame.f_locals.get("self") for frame in _callers())
    return next((workflow for workflow in workflows if isinstance(workflow, ConfigWorkflow)), None)


def _callers() -> Iterator[FrameType]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def _bundle_of(configs: Path) -> Path:
    configs = Path(configs).resolve()
    return configs.parent if configs.name == "configs" else configs


def _tracks_by_mlflow(parser: ConfigParser) -> bool:
    lists = (parser.get(name) or [] for name in ("train#handlers", "validate#handlers", "handlers"))
    return any(handler.get("_target_") == "MLFlowHandler" for handlers in lists for handler in handlers)
