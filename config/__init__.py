"""Read the settings of a program: defaults, then recipes, then --key=value; the last one wins.

Each program has one dataclass. A field is a key: its name, type, default, limits and meaning stand there and nowhere
else, and `--help` prints them. A recipe is a Python file: the names that it assigns are keys.

Here, too, is how a program ends: `UserError` and `explained` make one line of what went wrong, `run` prints it;
`StopSignals` lets a program finish what it is doing when it is asked to stop.
"""

import argparse
import ast
import dataclasses
import difflib
import itertools
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from operator import ge, gt, le, lt
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TextIO, TypeVar, get_args, get_type_hints

T = TypeVar("T")

BESIDE = Path(__file__).parent.parent  # the programs; a recipe that is not here may be there

BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True/False", NoneType: "None"}
LIMITS = {"least": ("at least", ge), "above": ("above", gt), "most": ("at most", le), "below": ("below", lt)}
# A word alone is probably the value of the first of these that the program has and whose test it passes.
BARE_WORDS = {
    "input": os.path.exists, "out_dir": os.path.isdir, "dataset": "fineweb".__eq__,
    "init_from": re.compile(r".*\.pt").fullmatch, "start": bool,
}  # fmt: skip
OUT_OF_MEMORY = "MemoryError|out of memory|allocate memory|bad_alloc"
# What torch raises when something outside the program fails, and what to tell the user.
BREAKDOWNS = {
    OUT_OF_MEMORY: "out of memory; try a smaller batch, model or context",
    "closed by peer|reset by peer|Broken pipe|Timed out waiting": "another process of this run has exited; "
    "--init_from=auto resumes from the last checkpoint",
}
ERASE_LINE = "\r\033[K"
STOPPING = "stopping, with a checkpoint, after this step or evaluation; Ctrl-C again: at once, without one"


class UserError(Exception):
    """What went wrong and what to do, in one line for the person at the keyboard. Ends the program with `status`."""

    status = 1


class ConfigError(UserError):
    """A mistake in the command, a recipe or a value: found before anything was done."""

    status = 2


@contextmanager
def explained(what: str, advice: str = "", kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn any exception that an untrusted file raises into one line: {what} ({class}: {message}){advice}.

    A UserError, a system error (which names its file), a missing package and a lack of memory pass as they are.
    """
    try:
        yield
    except (UserError, ModuleNotFoundError, MemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic of tokenizers' Rust is no Exception
        if getattr(error, "errno", None) or re.search(OUT_OF_MEMORY, str(error)):
            raise
        reason = next(iter(str(error).splitlines()), "")
        if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to run the code
            reason = "it holds more than tensors and plain values"
        raise kind(f"{what} ({type(error).__name__}: {reason}){advice}") from None


def typed(name: str, value: object) -> str:
    """--name=value, as one can type or paste it in a shell."""
    return f"--{name}={shlex.quote(str(value))}"


def key(default: Any, meaning: str, group: str | None = None, **limits: float) -> Any:
    """A field of a program's dataclass. Limits of a number: `least` or `above`, `most` or `below`.

    group: --help's title of the keys from this one on.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "group": group, "limits": limits})


def read(schema: type[T], argv: list[str]) -> T:
    """Build `schema` from its defaults, the recipes and the --key=value in `argv`. Raises ConfigError.

    The result's attribute `given` holds the names of the keys that a recipe or the command sets.
    """
    keys, other_names = get_type_hints(schema), getattr(schema, "other_names", {})
    options, rest = parser_of(schema).parse_known_args([*with_values(argv, keys)])
    values = {}
    for word in rest:
        if word.startswith("-"):
            name = word.partition("=")[0]
            hint = meant(name.lstrip("-"), keys, other_names, "--") or "; --help lists them all"
            raise ConfigError(f"unknown key {name}{hint}")
        values |= recipe(word, keys, other_names)
    values |= {name: convert(text, keys[name], f"--{name}") for name, text in vars(options).items()}
    for field in dataclasses.fields(schema):
        value, limits = values.get(field.name), field.metadata["limits"]
        if value is not None and not all(LIMITS[name][1](value, limit) for name, limit in limits.items()):
            raise ConfigError(f"{field.name} must be {within(limits)}, found {value}")
    try:
        config = schema(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    config.given = frozenset(values)
    return config


def with_values(argv: list[str], keys: dict[str, Any]) -> Iterator[str]:
    """The words of the command; --name of a key that may be True, before a key, a recipe or the end, is --name=True."""
    switches = {f"--{name}" for name, kind in keys.items() if bool in options(kind)}
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        yield f"{word}=True" if word in switches and re.match(r"-|.*\.py$", following) else word


def within(limits: dict[str, float]) -> str:
    return " and ".join(f"{LIMITS[name][0]} {limit}" for name, limit in limits.items())


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


class HelpFormatter(argparse.HelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.splitlines() for line in super(HelpFormatter, self)._split_lines(part, width)]


def parser_of(schema: type) -> Parser:
    """The parser of the --key=value; it leaves recipes and unknown keys to `read`, values as text.

    --help begins with the examples of the program's docstring.
    """
    keys = get_type_hints(schema)
    examples = re.findall("^    .*", sys.modules[schema.__module__].__doc__ or "", re.MULTILINE)
    parser = Parser(
        usage="\n".join(["%(prog)s [config/NAME.py ...] [--key=value ...]", "", *examples]),
        description=f"{schema.__doc__} Each key stands with its default:",
        epilog="A recipe is a Python file that assigns keys; --key=value overrides it. --key value works too.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=34, width=120),
    )
    group = parser.add_argument_group("keys")
    for field in dataclasses.fields(schema):
        if title := field.metadata["group"]:
            group = parser.add_argument_group(title)
        kind = keys[field.name]
        choice = "" if len(options(kind)) == 1 or str in options(kind) else describe(kind)
        limits = {name: limit for name, limit in field.metadata["limits"].items() if limit < 2**63}
        notes = "; ".join(filter(None, (choice, within(limits))))
        meaning = field.metadata["meaning"] + (f" ({notes})" if notes else "")
        group.add_argument(f"--{field.name}", metavar=str(field.default), help=meaning.replace("%", "%%"))
    return parser


def recipe(path: str, keys: dict[str, Any], other_names: Mapping[str, str]) -> dict[str, Any]:
    """Run the recipe and return the keys that it assigns; _names, imports and functions are its own business.

    `_after = "NAME.py"` names the recipe beside it that it starts from.
    """
    if not Path(path).is_file() and (BESIDE / path).is_file():
        path = str(BESIDE / path)
    if not path.endswith(".py") or not Path(path).is_file():
        files = [file.relative_to(base) for base in (Path(), BESIDE) for file in (base / "config").rglob("*.py")]
        recipes = [file.as_posix() for file in files if file.name != "__init__.py"]
        problem = f"{path} is neither --key=value nor a recipe (NAME.py)"
        hint = did_you_mean(path, recipes)
        if path.endswith(".py"):
            problem = f"there is no recipe {path}"
        elif path.partition("=")[0] in keys:
            hint = f", did you mean --{path}?"
        elif name := next((name for name, fits in BARE_WORDS.items() if name in keys and fits(path)), None):
            hint = f", did you mean {typed(name, path)}?"
        elif Path(path).is_file():
            hint = f"; python prepare.py --dataset=NAME {typed('input', path)} makes a dataset of it"
        raise ConfigError(problem + hint)
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}") from None
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        raise ConfigError(f"{path}, line {lines[-1] if lines else '?'}: {type(error).__name__}: {error}") from None
    own = {name for name in names if name.startswith("_")}
    for statement in ast.parse(Path(path).read_bytes()).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            own |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            own.add(statement.name)
    if unknown := names.keys() - own - keys.keys():
        name = min(unknown)
        hint = meant(name, keys, other_names) or "; names of your own begin with _"
        if "start" in keys and "out_dir" in names:
            hint = f": is it a recipe of train.py? {typed('out_dir', names['out_dir'])} names its run"
        raise ConfigError(f"{path}: unknown key {name}{hint}")
    values = {name: convert(names[name], keys[name], f"{path}: {name}") for name in names.keys() & keys.keys()}
    if "_after" not in names:
        return values
    try:
        return recipe(str(Path(path).with_name(names["_after"])), keys, other_names) | values
    except (TypeError, ValueError, RecursionError):
        raise ConfigError(f"{path}: _after must name another recipe beside it, found {names['_after']!r}") from None


def convert(value: Any, kind: Any, where: str) -> Any:
    """A recipe's value, or the text after --key=, as `kind`. Raises ConfigError."""
    text, allowed = str(value), options(kind)
    if NoneType in allowed and text == "None":
        return None
    if bool in allowed and text in BOOLS:
        return BOOLS[text]
    if isinstance(value, str) and (value in allowed or str in allowed):
        return os.path.expanduser(value) if value.startswith("~/") else value
    with suppress(ValueError, ArithmeticError):
        if float in allowed and math.isfinite(float(text)):
            return float(text)
        if int in allowed and math.isfinite(float(text)) and (number := Decimal(text)) == int(number):  # 1e3 is whole
            return int(number)
    raise ConfigError(f"{where} must be {describe(kind)}, found {value!r}")


def options(kind: Any) -> list:
    """The types and words that a type hint allows: bool | Literal["auto"] -> [bool, "auto"]."""
    return [option for part in get_args(kind) for option in options(part)] if get_args(kind) else [kind]


def describe(kind: Any) -> str:
    *most, last = (TYPE_NAMES.get(option, option) for option in options(kind))
    return f"{', '.join(most)} or {last}" if most else last


def meant(name: str, keys: Iterable[str], other_names: Mapping[str, str], prefix: str = "") -> str:
    """What to do about a key that does not exist; `other_names` are keys of other programs."""
    return f": {other_names[name]}" if name in other_names else did_you_mean(name, keys, prefix)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a program; `main` returns its exit status, None for 0.

    A user's mistake and Ctrl-C end in one line on stderr; only a bug shows its traceback.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # a model or a path may have any character
    try:
        rank_and_size()
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `sample.py | head`
        silence(sys.stdout)
        status = 128 + 13
    except KeyboardInterrupt:
        put("\n" * rewritable(sys.stderr), sys.stderr)  # what stands there, a sample perhaps, stays
        say(UserError("interrupted; nothing that was saved is lost"))
        status = 128 + 2
    except (UserError, OSError) as error:
        status = say(error)
    except ModuleNotFoundError as error:
        status = say(UserError(f"this needs another package: pip install {error.name}"))
    except (MemoryError, RuntimeError) as error:
        meanings = [text for words, text in BREAKDOWNS.items() if re.search(words, f"{type(error).__name__}: {error}")]
        if not meanings:
            raise
        status = say(UserError(meanings[0]), alone=meanings[0] == BREAKDOWNS[OUT_OF_MEMORY])
    for stream in (sys.stdout, sys.stderr):
        put("", stream)
    if one_of_several():
        os._exit(status)  # at an ordinary end gloo, cut off from the others, may abort: 1 in 13 did
    sys.exit(status)


class StopSignals:
    """Within the block, SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) are only noted, in `received`.

    A second Ctrl-C interrupts at once. The others may come twice: kernel and shell both send SIGHUP.
    """

    received = 0

    def __enter__(self) -> "StopSignals":
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as nohup sets it
        if threading.current_thread() is not threading.main_thread():
            numbers = []  # Python has signals in the main thread only
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if number == signal.SIGINT and reporting():  # not of the others, which SIGKILL may follow
            with suppress(RuntimeError):  # raised where the signal has interrupted another print
                put(f"{ERASE_LINE * rewritable(sys.stderr)}{STOPPING}\n", sys.stderr)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def say(error: UserError | OSError, alone: bool = False) -> int:
    """Print the error and return the exit status.

    What all processes of a machine meet, the first of them prints; what one meets `alone`, that one, with its rank.
    """
    alone = alone or isinstance(error, OSError)
    if one_of_several() and not alone and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)  # torchrun kills all when the first exits: let the one that prints be first
    else:
        who = f", process {os.environ['RANK']}" if alone and one_of_several() else ""
        what = f"{Path(sys.argv[0]).name}{who}: {' '.join(str(error).split())}"
        put(f"{ERASE_LINE * rewritable(sys.stderr)}{what}\n", sys.stderr)
    return getattr(error, "status", 1)


def rank_and_size() -> tuple[int, int]:
    """Which process this is, and of how many, as torchrun says it in the environment. Raises ConfigError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    rank, world_size, *others = found = [os.environ.get(name) for name in names]
    if rank is world_size is None:
        return 0, 1
    numbers = str(rank).isdecimal() and str(world_size).isdecimal() and int(rank) < int(world_size)
    if not numbers or not (all(others) or world_size == "1"):
        known = " ".join(f"{name}={value}" for name, value in zip(names, found, strict=True) if value is not None)
        raise ConfigError(
            f"{known} in the environment: start with torchrun, which sets {', '.join(names)}, or unset them"
        )
    return int(rank), int(world_size)


def one_of_several() -> bool:
    """Whether torchrun has started other processes beside this one."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def reporting() -> bool:
    """Whether this is the process, of those that torchrun has started together, that shows how the run goes."""
    return not one_of_several() or os.environ.get("RANK", "0") == "0"


def show(text: str) -> None:
    """Print a line on stdout, in place of a progress line; in process 0 alone."""
    if reporting():
        put(ERASE_LINE * rewritable(sys.stderr), sys.stderr)
        put(text + "\n", sys.stdout)


class Progress:
    """Progress of process 0 on stderr: one line, rewritten twice a second at most; a line in 5 s where that fails."""

    def __init__(self):
        self.shown = -math.inf  # when the last one was

    def due(self) -> bool:
        return reporting() and time.monotonic() - self.shown > (0.5 if rewritable(sys.stderr) else 5)

    def show(self, text: str) -> None:
        if self.due():
            self.shown = time.monotonic()
            if rewritable(sys.stderr):  # a line that wraps could not be erased
                put(ERASE_LINE + text[: shutil.get_terminal_size().columns - 1], sys.stderr)
            else:
                put(text + "\n", sys.stderr)


progress = Progress()


def rewritable(stream: TextIO) -> bool:
    """Whether what is printed there can be rewritten: in a terminal and in a notebook, whose streams may be any."""
    return "ipykernel" in sys.modules or (hasattr(stream, "isatty") and stream.isatty())


def put(text: str, stream: TextIO) -> None:
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:  # the terminal is gone or the disk full
        silence(stream)


def silence(stream: TextIO) -> None:
    """Print no more there."""
    with suppress(OSError, AttributeError):  # not every stream is a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
