"""The table any network can enter: what a YAML file names is trained, evaluated and compared."""

from experiments.plan import Cell, Plan, read_plan
from experiments.table import Table, tabulate

__all__ = ["Cell", "Plan", "Table", "read_plan", "tabulate"]
