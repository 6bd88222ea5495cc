"""What the bundles' configurations ask of the run that reads them."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bundles.predictor import load

# The working directory comes first on the path, and a package there may have the name of one of ours.
# In a pack they are parts of another package.
for _name in ("networks", "transforms", "evaluation") if __name__ == "bundles" else ():
    _found = Path(getattr(importlib.util.find_spec(_name), "origin", None) or "nothing/here").resolve()
    if _found.parents[1] != Path(__file__).resolve().parents[1]:
        sys.exit(f"{_found} hides this project's package {_name}: run from another folder, or rename it")

from bundles.export import export_torchscript  # noqa: E402  (only after the check)
from bundles.run import (  # noqa: E402
    configuration,
    end_in_a_line,
    name,
    one_line,
    prepare_run,
    refuse_stray_words,
    root,
)

__all__ = ["configuration", "export_torchscript", "load", "name", "one_line", "prepare_run", "root"]


def __getattr__(name: str) -> Any:
    """`load` comes when it is asked for: configurations import this package and have no use for it."""
    if name == "load":
        from bundles.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


end_in_a_line()
refuse_stray_words()
