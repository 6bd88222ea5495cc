"""What a configuration needs of the run that reads it: where its bundle lies, its settings checked, errors as lines.

MONAI runs a configuration as a program, and wraps whatever is raised below an expression or component in errors of its
own. Here the line that is meant for the user is found again.
"""

from __future__ import annotations

import ast
import importlib.util
import linecache
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.engines import Workflow
from monai.utils import ensure_tuple

from bundles.settings import (
    RULES,
    TRACKING,
    checked,
    close,
    refuse_no_component,
    refuse_no_python,
    refuse_unknown,
    with_values,
)
from networks.training.log import remember_log
from networks.training.stopping import of_worker
from transforms import InputError, check_output, error_chain, log_warnings, printable, shortened

# The folders that a run writes to.
WRITTEN = {"training": ("ckpt_dir", "log_dir"), "evaluating": ("output_dir",), "inferring": ("output_dir",)}
# The command as prepare_run found it.
_command: dict[str, Any] = {}
LONGEST = 1200
PACKAGES = ("bundles", "networks", "transforms", "evaluation", "prepare")
# What stands before their names: nothing, or the package of a pack.
ABOVE = __name__.removesuffix("bundles.run")
INPUT_ERROR = f"{InputError.__module__}.{InputError.__qualname__}: "


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
    if workflow := running_workflow():
        return str(_bundle_of(workflow.config_root_path))
    for frame in _callers():
        # the commands of monai.bundle.scripts that take configurations without a workflow
        if frame.f_globals.get("__name__") == "monai.bundle.scripts" and (files := frame.f_locals.get("config_file_")):
            return str(_bundle_of(Path(files if isinstance(files, str) else files[0]).parent))
    raise ValueError("the configuration's file is not known here: set bundle_root, the folder that holds configs/")


def prepare_run() -> None:
    """Checks the settings of the run before any work; every configuration calls this first in `initialize`.

    Words of the command line become what YAML would make of them: `--train#trainer#amp false` arrives as the word
    "false", which Python takes for true. From here on an error that a user can mend ends the run with one line;
    `--debug true` shows its traceback.

    Raises:
        InputError: when there is no such setting, or it cannot have this value; for `--tracking mlflow` without MLflow.

    Example:
        >>> prepare_run()  # outside of a run there is nothing to prepare
    """
    workflow = running_workflow()
    if workflow is None:
        return
    if int(os.environ.get("RANK", 0)):
        # rank 0 speaks for all; errors are everybody's
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    if workflow.run_id == "training":
        # for training.log, which begins when its folder is the run's
        remember_log(anew=True)
    parser = workflow.parser
    config: dict[str, Any] = with_values(parser.config)
    end_in_a_line()
    files, overrides = _given()
    if files and sys.argv.count("--input") > 1:
        raise InputError("--input is given twice", remedy="give it once: a folder, or a quoted pattern")
    paths = [str(Path(file).resolve()) for file in ensure_tuple(files or ())]
    _command.update(config_files=paths, overrides=overrides, working_directory=os.getcwd())
    if files:
        plain = ConfigParser.load_config_files(files)
        refuse_unknown({name: value for name, value in overrides.items() if name not in TRACKING}, plain)
        refuse_no_component(overrides, plain)
    refuse_no_python(config)
    _check_channels(config)
    overlay = next(Path(workflow.config_root_path).glob("multi_gpu*"), Path("multi_gpu.yaml"))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "start_process_group" not in str(config.get("initialize")):
        raise InputError(
            "torchrun started several processes, and each would train or predict everything into the same files",
            remedy=f"add {overlay.name} to the files of --config_file",
        )
    if _tracks_by_mlflow(parser) and not importlib.util.find_spec("mlflow"):
        raise InputError("--tracking mlflow needs MLflow: pip install mlflow-skinny sqlalchemy alembic")
    config |= {name: checked(name, config[name]) for name in RULES if name in config}
    config |= {name: _literal(value) for name, value in overrides.items() if name in config and _is_name(value)}
    parser.config = config  # type: ignore[assignment]
    parser.parse(reset=True)
    for name in WRITTEN.get(workflow.run_id, ()):
        check_output(parser.get_parsed_content(name))
    parser.parse(reset=True)


def end_in_a_line() -> None:
    """From here on an error that a user can mend ends the run with one line, and warnings are lines of the log.

    It is called when a configuration imports this package: MONAI evaluates the imports before all else.
    """
    if workflow := running_workflow():
        sys.excepthook = _ErrorLine(debug=with_values(workflow.parser.get("debug")) is True)
        log_warnings()


def _check_channels(config: dict[str, Any]) -> None:
    """Refuses a network that takes another number of channels than pictures are read with."""
    network, channels = config.get("network_def"), config.get("in_channels")
    taken = network.get("in_channels") if isinstance(network, dict) else None
    if isinstance(taken, int) and isinstance(channels, int) and taken != channels:
        fact = f"--network_def takes {taken} channels, pictures are read with {channels}"
        raise InputError(fact, remedy=f"give --in_channels {taken} too, or in_channels {channels} in network_def")


def _is_name(value: Any) -> bool:
    """True for what MONAI would take for something else than the name of a file that it is."""
    if not isinstance(value, str) or not value:
        return False
    if value[0] in "$@":
        # an expression or a reference, unless there is such a file
        return os.path.lexists(value)
    return "#" in value and value[0] != "%"


def _literal(value: str) -> str:
    """An expression that gives the text as it is: MONAI makes "::" of "#", and looks for references behind "@"."""
    return "$" + repr(value).replace("#", r"\x23").replace("@", r"\x40")


def configuration() -> dict[str, Any]:
    """The files of the run's configuration, its overrides, and the configuration that came of both.

    Example:
        >>> configuration()  # outside of a run
        {}
    """
    workflow = running_workflow()
    if workflow is None:
        return {}
    return {**_command, "configuration": workflow.parser.get()}


def name() -> str:
    """The name of the bundle whose configuration is being read, as its metadata say; the folder's where they do not.

    Example:
        >>> name()  # outside of a run
        'unknown'
    """
    workflow = running_workflow()
    if workflow is None:
        return "unknown"
    refuse_stray_words()
    metadata: Any = workflow.parser.get(ConfigParser.meta_key) or {}
    return str(metadata.get("name") or _bundle_of(workflow.config_root_path).name)


def one_line(error: BaseException) -> str | None:
    """What a user is to read of an error; None where it is a fault of the program, whose traceback is needed.

    Lines are what this project's packages raise on purpose, a ValueError or OSError, however deep below MONAI's own
    errors or in which process, and what the system says of files and memory.

    Example:
        >>> error = RuntimeError("Failed to evaluate ConfigExpression")
        >>> error.__cause__ = InputError("no such file", path="a.png")
        >>> one_line(error), one_line(IndexError("list index out of range"))
        ('a.png: no such file', None)
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    for one in error_chain(error):
        text = str(one)
        if isinstance(one, InputError) or (isinstance(one, ValueError | OSError) and _raised_here(one)):
            # torch hands over what a worker raised as text that ends with it
            return text.strip().splitlines()[-1].removeprefix(INPUT_ERROR)
        if worker := re.findall(rf"^{re.escape(INPUT_ERROR)}(.+)$", text, re.MULTILINE):
            return str(worker[-1])
        if isinstance(one, OSError) and one.errno is not None:
            return f"{one.filename}: {one.strerror}" if one.filename else str(one.strerror)
        if isinstance(one, MemoryError) or re.search(r"out of memory|can't allocate memory", text):
            return "there is not enough memory: give a smaller --batch_size or --image_size"
        if found := re.search(r"expected input.* to have (\d+) channels, but got (\d+) channels", text):
            return f"the network takes {found[1]} channels, the images have {found[2]}: give both the same in_channels"
        if "Expected more than 1 value per channel when training" in text:
            return (
                "batch norms cannot learn from one pixel: give a larger --image_size, or a --batch_size that leaves no"
                " single image at the end"
            )
        if line := of_worker(one, _engines(one)) or _of_component(one) or _of_configuration(one) or _of_expression(one):
            return line
    return None


def _of_expression(error: BaseException) -> str | None:
    """What is wrong with an expression that fails itself, and not in what it calls."""
    cause, text = error.__cause__, str(error)
    trace = cause.__traceback__ if cause else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if not text.startswith("Failed to evaluate ConfigExpression") or trace is None:
        return None
    if trace.tb_frame.f_code.co_filename != "<string>":
        return None
    expression = re.sub(r"__local_refs\[['\"]([\w:]+)['\"]\]", r"@\1", ast.literal_eval(text.partition("\n")[2]))
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return f"{shortened(printable(expression.replace('::', '#')))} cannot be evaluated: {shortened(printable(reason))}"


def _of_component(error: BaseException) -> str | None:
    """What a component of another library says of the values that it was given."""
    component = re.match(r"Failed to instantiate component '([\w.]+)'", str(error))
    cause = error.__cause__
    if component is None or cause is None or type(cause) not in (ValueError, TypeError) or _raised_here(cause):
        return None
    path, text = component[1], str(cause).strip()
    if _is_ours(path) or "\n" in text or "unexpected keyword argument" in text:
        return None
    return f"{path.rpartition('.')[2]}: {text}"


def _of_configuration(error: BaseException) -> str | None:
    """What MONAI says of a configuration that it cannot follow."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and (path := re.search(r"class or function path: '(.*)'", text)):
        module, _, name = path[1].rpartition(".")
        near = close(name, dir(sys.modules.get(module)))
        return f"there is no {path[1]}" + (f"; did you mean {module}.{near[0]}?" if near else "")
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        return text.replace(".__init__()", "").replace("got an unexpected keyword argument", "takes no setting")
    if path := re.search(r"the referring item [`'\"]@?([\w:#]+)", text):
        return f"the configuration refers to @{path[1].replace('::', '#')}, which it does not define"
    if circle := re.search(r"detected circular references '(.*)' for id='(.*)'", text):
        through = f", through {circle[2].replace('::', '#')}" if circle[1] != circle[2] else ""
        return f"--{circle[1].replace('::', '#')} refers to itself{through}: give it a value"
    if isinstance(error, ValueError) and text.startswith("run ID "):
        known = [name for name in ("training", "evaluating", "inferring", "exporting") if name in _sections(error)]
        near = close(text.split("'")[1], known)
        remedy = f"did you mean {near[0]}?" if near else f"there {'are' if len(known) > 1 else 'is'} {', '.join(known)}"
        return f"{shortened(printable(text.removesuffix('.')))}; {remedy} (others are in other files)"
    return None


def _sections(error: BaseException) -> list[str]:
    """Those of the configuration of the workflow that raised the error."""
    workflows = (one for one in _objects(error) if isinstance(one, ConfigWorkflow))
    return next((list(workflow.parser.get()) for workflow in workflows), [])


def _engines(error: BaseException) -> list[Workflow]:
    """Those that ran when the error was raised."""
    return [one for one in _objects(error) if isinstance(one, Workflow)]


def _objects(error: BaseException) -> Iterator[Any]:
    """Those whose methods the error came through."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_locals.get("self")
        trace = trace.tb_next


def _raised_here(error: BaseException) -> bool:
    """True where a `raise` of this project made the error, and not a library that it called with wrong arguments."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not _is_ours(trace.tb_frame.f_globals.get("__name__", "")):
        return False
    return linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip().startswith("raise ")


def _is_ours(module: str) -> bool:
    """True for a module of these packages, as it is called here or in a pack's configuration."""
    name = module.removeprefix(ABOVE) if ABOVE and module.startswith(ABOVE) else module.removeprefix("scripts.")
    return name.partition(".")[0] in PACKAGES


class _ErrorLine:
    """An excepthook that prints one line where there is one, after the traceback when debugging; the exit code is 1."""

    def __init__(self, debug: bool) -> None:
        self.debug = debug
        hook = sys.excepthook
        self.previous: Callable[..., object] = hook.previous if isinstance(hook, _ErrorLine) else hook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = one_line(error)
        if line is None or self.debug:
            self.previous(kind, error, trace)
        if line is not None:
            sys.stdout.flush()
            process = f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
            print(f"{process}{shortened(line, LONGEST)}", file=sys.stderr)


def refuse_stray_words() -> None:
    """Ends a run whose `--input *.png` a shell has made many words of: the others arrive as names of sections.

    It is called when a configuration imports this package and where it asks for its name, because `initialize` does not
    run then.
    """
    workflow = running_workflow()
    if workflow is None:
        return
    for given, default in ((workflow.init_id, "initialize"), (workflow.final_id, "finalize")):
        if given != default and given not in workflow.parser:
            sys.exit(
                f"{given}: one word more than expected; quote a pattern, --input 'folder/*.png', so that the shell"
                " leaves it alone, or name the folder"
            )


def _given() -> tuple[Any, dict[str, Any]]:
    """The configuration's files and the overrides of a run of MONAI's commands."""
    for frame in _callers():
        if frame.f_code.co_name == "create_workflow" and frame.f_globals.get("__name__") == "monai.bundle.scripts":
            names = {"config_file", "meta_file", "logging_file", "tracking", "init_id", "run_id", "final_id"}
            # monai.bundle.load gives these
            names |= {"workflow_type", "properties_path"}
            given = frame.f_locals.get("_args", {})
            return frame.f_locals.get("config_file"), {key: given[key] for key in given if key not in names}
    return None, {}


def running_workflow() -> ConfigWorkflow | None:
    """MONAI's object for the run that is going on, where one is."""
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
    lists = (parser.get(name) for name in ("train#handlers", "validate#handlers", "handlers"))
    handlers = [handler for one in lists if isinstance(one, list) for handler in one]
    return any(isinstance(handler, dict) and handler.get("_target_") == "MLFlowHandler" for handler in handlers)
