"""The door: flags, the config, and one sentence for everything a user can get wrong.

`run_main` parses the command line, builds the frozen config and calls `main`; whatever comes out
of either becomes an exit code. Nothing here imports jax: an error or a finished run answers fast.
"""

import ast
import errno
import importlib.util
import inspect
import logging
import os
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_dict, config_flags

from mtllm_jax import distributed
from mtllm_jax.allocator import keep_freed_memory
from mtllm_jax.config import MTLLM, SDRRL
from mtllm_jax.interrupt import (
    Interrupted,
    graceful_stop,
    last_stop,
    quit_on_signal,
    raise_on_signal,
    same_command,
)
from mtllm_jax.runfolder import read_json
from mtllm_jax.schema import (
    field_kinds,
    is_optional,
    nearest,
    plain,
    resolve,
    to_config_dict,
    to_dict,
    wanted,
)

__all__ = [
    "Interrupted", "graceful_stop", "overridden", "quiet", "resolve", "run_main", "to_dict",
]  # fmt: skip

Schema = Callable[[Mapping[str, Any]], type]

RECIPES: dict[str, type[MTLLM] | type[SDRRL]] = {"mtllm": MTLLM, "sdrrl": SDRRL}
_OVERRIDE = re.compile(r"--?(no)?config\.(?P<path>[^=]*)(=(?P<text>.*))?", re.DOTALL)
_LIBRARIES = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def model_flags(
    model: str = "folder of a finished run, or what export.py wrote",
    rows: int = 32,
    rows_help: str = "texts in one forward pass",
) -> tuple[flags.FlagHolder[str | None], flags.FlagHolder[int], flags.FlagHolder[int]]:
    """Define --model, --batch_rows (`rows`) and --fsdp, of the tools that use a trained model."""
    fsdp = "devices that each copy of the weights is cut over"
    return (
        flags.DEFINE_string("model", None, model, **_tool()),
        flags.DEFINE_integer("batch_rows", rows, rows_help, **_tool()),
        flags.DEFINE_integer("fsdp", 1, fsdp, **_tool()),
    )


def rows_flags() -> tuple[
    flags.FlagHolder[str | None], flags.FlagHolder[str | None], flags.FlagHolder[Any]
]:
    """Define --input, --output and --dtype, of the tools that write rows as JSON lines."""
    rows, dtypes = ".jsonl, .jsonl.gz, .csv, .tsv or .parquet", ["float32", "bfloat16"]
    return (
        flags.DEFINE_string("input", None, rows, **_tool()),
        flags.DEFINE_string("output", None, ".jsonl, to be written", **_tool()),
        flags.DEFINE_enum("dtype", "float32", dtypes, "of weights and products", **_tool()),
    )


def _tool() -> dict[str, Any]:
    """That flags are defined for the tool that was started, which counts them as its own."""
    return {"module_name": sys.argv[0]}


def run_main(
    main: Callable[..., None],
    usage: str,
    schema: Schema | None = None,
    resumes: Callable[[], bool] = lambda: True,
) -> None:
    """Parse the command line, call `main`, and leave the process with its exit code.

    Args:
      main: called with the resolved config, or without arguments when there is no schema.
      usage: printed by --help above the list of flags.
      schema: maps what a config file returned to its dataclass; None = no --config flag.
      resumes: whether the same command goes on after an interrupt; asked when one comes.

    Exit codes: 0 done, or stopped by SIGTERM; 2 a user's mistake, a full disk, or a training that
    diverged (one sentence on stderr); 130 Ctrl-C. Any other exception is a bug and keeps its
    traceback. One of several processes that ends early ends the others with its code; 1 where
    another has died.
    """
    keep_freed_memory()
    quiet()
    raise_on_signal()
    try:
        try:
            arguments = _parse(sys.argv, usage, schema)
            main(*arguments)
            distributed.finish()
        except Exception as error:
            if last_stop().raised and not isinstance(error, Interrupted):
                raise KeyboardInterrupt from error
            raise
        code = 0
    except (Interrupted, KeyboardInterrupt) as stopped:
        quit_on_signal()
        where = f"stopped: {stopped}" if str(stopped) else "stopped."
        after_echo = "\n" if sys.stderr.isatty() else ""  # the terminal has shown ^C on this line
        together = isinstance(stopped, Interrupted)  # all of several processes, at the same step
        if distributed.is_first() or not together:
            print(after_echo + where, file=sys.stderr)
            if flags.FLAGS.is_parsed() and resumes():
                print(f"Go on with: {same_command()}", file=sys.stderr)
        if together:
            distributed.finish()
        code = last_stop().exit_code
    except Exception as error:
        lost = distributed.lost(error)
        if lost is None and not _is_users(error):
            if not distributed.in_job():
                raise
            traceback.print_exc()
            code = 1
        else:
            print(f"error: {lost or ' '.join(str(error).split())}", file=sys.stderr)
            code = 1 if lost else 2
    distributed.leave(code)
    sys.exit(code)


def of_recipe(values: Mapping[str, Any]) -> type:
    """The config class of the recipe that a config file names. ValueError where it names none."""
    recipe = values.get("recipe")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(f"config.recipe is {recipe!r}; it must be one of {', '.join(RECIPES)}.")
    return RECIPES[recipe]


def of_mtllm(values: Mapping[str, Any]) -> type[MTLLM]:
    """The schema of a tool for the recipe MT-LLM alone. ValueError for a config of another."""
    if (recipe := values.get("recipe")) != "mtllm":
        raise ValueError(f"config.recipe is {recipe!r}; for this tool it must be 'mtllm'.")
    return MTLLM


def overridden() -> list[str]:
    """Dotted names of the config's fields that the command line sets."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


def quiet() -> None:
    """Silence what libraries print and a user cannot use; what the user has set stays."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in (
        "jax", "orbax", "asyncio", "transformers", "huggingface_hub", "etils", "grain", "gcsfs",
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _is_users(error: Exception) -> bool:
    """Whether an error is a sentence for the user: raised by this project, not inside a library."""
    if isinstance(error, flags.Error):
        return True
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK
    if not isinstance(error, (ValueError, FloatingPointError)):
        return False
    if any("JAX" in note for note in getattr(error, "__notes__", ())):
        return False  # jax took its own frames out of the traceback, and says so in this note
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).absolute()
    ours = raised_in.is_relative_to(Path(__file__).parent)
    generated = raised_in.name.startswith("<")
    return ours or not (generated or any(map(raised_in.is_relative_to, _LIBRARIES)))


def _parse(argv: list[str], usage: str, schema: Schema | None) -> tuple[Any, ...]:
    """Parse all flags; returns main's arguments. Prints the help page and leaves if asked to."""
    own_flags = flags.FLAGS.get_flags_for_module(argv[0])
    if any(re.fullmatch(r"--?(h|help\w*|\?)", argument) for argument in argv[1:]):
        print(_help(usage, own_flags, schema))
        sys.exit(0)
    argv = flags.FLAGS.read_flags_from_files(argv)
    # Otherwise absl stops at the first positional and leaves every flag behind it unread.
    flags.FLAGS.set_gnu_getopt(True)
    known = {flag.name: _kind(flag) for flag in own_flags}
    if schema is None:
        _parse_flags(argv, known)
        return ()
    source, rest = _take_config(argv)
    values = load_config(source)
    config_class = schema(values)
    config: Any = resolve(config_class, values)
    kinds = field_kinds(config_class, "config")
    typed = to_config_dict(config)
    rest = _check_overrides(rest, kinds, typed)
    config_flags.register_flag_parser_for_type(tuple, _TupleParser())
    config_flags.DEFINE_config_dict("config", typed, sys_argv=rest)
    _parse_flags(rest, known | {path: wanted(kind) for path, kind in kinds.items()})
    return (resolve(config_class, flags.FLAGS["config"].value),)


def _kind(flag: flags.Flag) -> str:
    """What a flag's value must be."""
    values = getattr(flag.parser, "enum_values", None)
    return f"one of {', '.join(values)}" if values else str(flag.flag_type())


def _help(usage: str, own_flags: list[flags.Flag], schema: Schema | None) -> str:
    rows = [(f"--{flag.name}", str(flag.help)) for flag in own_flags]
    if schema is not None:
        rows.insert(0, ("--config", "FILE.py, FILE.py:NAME, or RUN/config.json to repeat a run"))
        rows.insert(1, ("--config.FIELD", "another value for one field, as in --config.seed=1"))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([usage.strip(), "", *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _parse_flags(argv: list[str], known: Mapping[str, str]) -> None:
    """Let absl parse `argv`; `known` maps flags to what their values must be."""
    try:
        positionals = flags.FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        raise ValueError(f"--{name} is not a flag; {_offer(name, known, '--')}.") from None
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --(.+?)=(.*?): ", str(error), re.DOTALL)
        if match is None or match[1] not in known:
            raise
        name, text = match.groups()
        shown = name if name.startswith("config.") else f"--{name}"
        kind = {"bool": "true or false", "int": "an int"}.get(known[name], known[name])
        raise ValueError(f"{shown} is {text!r}; it must be {kind}.") from None
    if positionals:
        raise ValueError(f"{positionals[0]!r} is left over: every setting is a --flag=value.")


def _take_config(argv: list[str]) -> tuple[str, list[str]]:
    """Take --config=SOURCE (or --config SOURCE) out of the arguments."""
    found: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name in ("--config", "-config"):
            found.append(text if equals else next(arguments, ""))
        else:
            rest.append(argument)
    if len(found) > 1:
        raise ValueError(f"--config is given {len(found)} times; it may be given once.")
    if not found or not found[0]:
        raise ValueError("--config is missing; name a config file, as --config=configs/mtllm.py.")
    return found[0], rest


def load_config(source: str) -> dict[str, Any]:
    """Read FILE.py, FILE.py:NAME or FILE.json as nested plain values.

    Raises ValueError if the file or the NAME does not exist, or the file cannot be read.
    """
    if source.endswith(".json"):
        return _load_json(epath.Path(source))
    path, colon, name = source.rpartition(":") if ".py:" in source else (source, "", "")
    if not path.endswith(".py"):
        raise ValueError(
            f"--config is {source!r}; it must be FILE.py, FILE.py:NAME or RUN/config.json."
        )
    _require_file(Path(path))
    return _load_python(Path(path), name if colon else None)


def _require_file(path: epath.Path | Path) -> None:
    if path.is_file():
        return
    folder = path.parent
    siblings = [p.name for p in folder.glob(f"*{path.suffix}")] if folder.is_dir() else []
    here = f"; {folder.absolute().name} holds {_some(sorted(siblings))}" if siblings else ""
    raise ValueError(f"--config names {path}, which is not a file{here}.")


def _load_json(path: epath.Path) -> dict[str, Any]:
    _require_file(path)
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; a config is a JSON object.")
    return values


def _load_python(path: Path, name: str | None) -> dict[str, Any]:
    """Run a config file and call its get_config, with NAME if one is given."""
    spec = importlib.util.spec_from_file_location("_mtllm_config", path)
    assert spec is not None and spec.loader is not None  # both exist for every .py file
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if callable(get_config):
            values = _call_get_config(path, get_config, getattr(module, "RECIPES", {}), name)
    except _ConfigError:
        raise
    except Exception as error:
        raise ValueError(_config_failure(path, error)) from None
    if not callable(get_config):
        raise ValueError(f"{path} has no function get_config.")
    if not isinstance(values, (Mapping, config_dict.ConfigDict)):
        kind = type(values).__name__
        raise ValueError(f"get_config of {path} returned {kind}; it must return a ConfigDict.")
    return plain(values)


class _ConfigError(ValueError):
    """What a user got wrong about a config file, as against what fails inside it."""


def _call_get_config(
    path: Path, get_config: Callable[..., Any], recipes: Mapping[str, Any], name: str | None
) -> Any:
    if name is None:
        return get_config()
    if recipes and name not in recipes:
        close = nearest(name, recipes, limit=1)
        near = f" (the nearest: {close[0]})" if close else ""
        raise _ConfigError(f"{path} has no settings {name!r}; it has {', '.join(recipes)}{near}.")
    if not inspect.signature(get_config).parameters:
        raise _ConfigError(f"{path}:{name} names settings, but get_config of {path} takes no name.")
    return get_config(name)


def _config_failure(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}."
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    where = f", line {lines[-1]}" if lines else ""
    return f"{path}{where}: {type(error).__name__}: {error}"


def _check_overrides(
    argv: list[str], kinds: Mapping[str, Any], typed: config_dict.ConfigDict
) -> list[str]:
    """Check the names of all --config.FIELD flags: absl would fail on them without a hint.

    Returns the arguments without `--config.FIELD=none`, which empties an optional field of
    `typed` and which no parser of absl knows.
    """
    rest: list[str] = []
    for argument in argv:
        match = _OVERRIDE.match(argument)
        path = f"config.{match['path']}" if match else ""
        if match and path not in kinds:
            inside = [known for known in kinds if known.startswith(path + ".")]
            if inside:
                raise ValueError(f"{path} holds fields of its own; set {_some(inside)}.")
            raise ValueError(f"{path} is not a field of this config; {_offer(path, kinds)}.")
        group = _group_of(path, typed) if match else typed
        if match and match["text"] == "none" and is_optional(kinds[path]):
            group[path.rpartition(".")[2]] = None
        else:
            rest.append(argument)
    return rest


def _group_of(path: str, typed: config_dict.ConfigDict) -> config_dict.ConfigDict:
    names = path.split(".")
    for depth, name in enumerate(names[1:-1], start=2):
        typed = typed[name]
        if typed is None:
            absent = ".".join(names[:depth])
            raise ValueError(f"{path} cannot be set: {absent} is none in this config.")
    return typed


class _TupleParser(flags.ArgumentParser[tuple[Any, ...]]):
    """Reads `a,b`, `(1, 2)` and `["a", "b"]`."""

    syntactic_help = "a tuple"

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if not isinstance(argument, str):
            return tuple(argument)
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            text = argument.strip()
            if text[:1] + text[-1:] in ("()", "[]"):
                text = text[1:-1]
            value = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

    def flag_type(self) -> str:
        return "tuple"


def _offer(name: str, candidates: Mapping[str, Any], prefix: str = "") -> str:
    """The nearest names, or else some of them, as the end of a sentence."""
    close = [prefix + candidate for candidate in nearest(name, candidates)]
    if close:
        return f"the nearest: {', '.join(close)}"
    return f"there is {_some([prefix + candidate for candidate in candidates])}"


def _some(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
