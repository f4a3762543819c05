"""What every program here needs: its settings, how it ends, and how it prints.

Each program has one dataclass. A field is a key: its name, type, default, limits and meaning are given only there, and
`--help` prints them. A recipe is a Python file that assigns values to keys; the other files of this folder
are recipes.
"""

import dataclasses
import difflib
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import symtable
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from operator import ge, gt, le, lt
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TextIO, get_args, get_type_hints

PROGRAMS = Path(__file__).parent.parent  # the folder of train.py; recipes are looked up here, too
# What these words mean, where the key's type allows it.
CONSTANTS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False, "None": None}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True/False", NoneType: "None"}
LIMITS = {"least": ("at least", ge), "above": ("above", gt), "most": ("at most", le), "below": ("below", lt)}
# What torch's errors say when something outside the program has failed.
OUT_OF_MEMORY = "MemoryError|out of memory|allocate memory|bad_alloc"
LOST_PROCESS = "closed by peer|reset by peer|Broken pipe|Timed out waiting"
STOPPING = "stopping, with a checkpoint, after this step or evaluation; Ctrl-C again: at once, without one"
ERASE_LINE = "\r\033[K"  # on a terminal


class UserError(Exception):
    """What went wrong and what to do, in one line for the user. It ends the program with exit status `status`."""

    status = 1


class ConfigError(UserError):
    """A mistake in the command, a recipe or a value, found before anything was done."""

    status = 2


# Settings


def key(default: Any, meaning: str, group: str | None = None, also: str = "", **limits: float) -> Any:
    """A field of a program's dataclass. A number's limits are `least` or `above`, `most` or `below`.

    group: the title that --help prints above this key. also: what other programs call it, names separated by spaces;
    a user who types one of them is told ours.
    """
    metadata = {"meaning": meaning, "group": group, "also": also.split()}
    metadata["limits"] = [(*LIMITS[limit], bound) for limit, bound in limits.items()]  # ("at least", operator.ge, 1)
    return dataclasses.field(default=default, metadata=metadata)


def keys(schema: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(schema)}


def read(schema: type, argv: list[str]) -> Any:
    """Build `schema`, a program's dataclass, from its command-line arguments. Raises ConfigError.

    Recipes override the defaults and the recipes before them; --key=value overrides every recipe, before or after it.
    The result's attribute `given` holds the names of the keys that a recipe or the command sets.
    """
    if {"-h", "--help"} & {*argv}:
        put(help_text(schema), sys.stdout)
        sys.exit(0)
    words, from_recipes, from_command = [*argv], {}, {}
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            name, value = key_and_value(schema, word, words)
            from_command[name] = convert(schema, name, value, f"--{name}")
        else:
            from_recipes |= recipe(schema, word)
    values = from_recipes | from_command
    with as_config_error():
        config = schema(**values)
    config.given = frozenset(values)
    return config


def key_and_value(schema: type, word: str, rest: list[str]) -> tuple[str, str]:
    """Read "--name=value", "--name value" or a switch's "--name"; a value after the space is taken out of `rest`."""
    name, equals, value = word.lstrip("-").partition("=")
    if not word.startswith("--") or name not in keys(schema):
        hint = key_hint(schema, name, "--") or "; --help lists them all"
        raise ConfigError(f"unknown key {word.partition('=')[0]}{hint}")
    if equals:
        return name, value
    alone = not rest or rest[0].startswith("--")
    if bool in allowed_values(schema, name) and (alone or rest[0].endswith(".py")):  # --switch config/NAME.py
        return name, "True"
    if alone:
        raise ConfigError(f"--{name} needs a value, {requirement(schema, name)}")
    return name, rest.pop(0)


def recipe(schema: type, path: str, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Run a recipe. Return the values that it assigns to keys, and below them those of the recipe that `_after` names.

    `_after = "NAME.py"` stands in a recipe that changes another one. derived: the recipes that led here by it.
    """
    file = Path(path) if Path(path).is_file() else PROGRAMS / path
    if file.suffix != ".py" or not file.is_file():
        raise no_recipe(schema, path)
    if file in derived:
        raise ConfigError(f"{file}: _after leads back to it")
    try:
        names = runpy.run_path(str(file))
        symbols = symtable.symtable(file.read_bytes(), str(file), "exec").get_symbols()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from None
    # Any name must be a key, but for _names, imports, functions and classes. Only the symbol table tells an imported
    # value from one that is assigned.
    own = {symbol.get_name() for symbol in symbols if symbol.is_imported() or symbol.is_namespace()}
    for name in sorted(names.keys() - keys(schema).keys() - own):
        if not name.startswith("_"):
            hint = key_hint(schema, name) or "; names of your own begin with _"
            raise ConfigError(f"{file}: unknown key {name}{hint}")
    values = {name: convert(schema, name, names[name], f"{file}: {name}") for name in keys(schema) if name in names}
    if "_after" in names:  # a file in the same folder
        before = file.parent / Path(str(names["_after"])).name
        values = recipe(schema, str(before), (*derived, file)) | values
    return values


def convert(schema: type, name: str, value: Any, where: str) -> Any:
    """Return `value` as the key's type. It is text from the command, or anything from a recipe or a checkpoint.

    Raises ConfigError "{where} must be ..., found ...".
    """
    allowed, text = allowed_values(schema, name), str(value)
    if text in CONSTANTS and type(CONSTANTS[text]) in allowed:
        return CONSTANTS[text]
    if isinstance(value, str) and (value in allowed or str in allowed):  # a word of a Literal, or any text
        return os.path.expanduser(value) if value.startswith("~/") else value
    with suppress(ValueError):  # of `float`: then it is no number
        number = float(text)
        if int in allowed and number.is_integer():  # 1e3 is a whole number, too
            number = int(Decimal(text))  # exact, also above 2**53
        fits = type(number) in allowed and math.isfinite(number)  # where int is allowed alone, 1.5 does not fit
        if fits and all(holds(number, bound) for _, holds, bound in keys(schema)[name].metadata["limits"]):
            return number
    raise ConfigError(f"{where} must be {requirement(schema, name)}, found {value!r}")


def allowed_values(schema: type, name: str) -> list:
    """The types and words that a key may have: bool | Literal["auto"] -> [bool, "auto"]."""
    annotation = get_type_hints(schema)[name]
    parts = get_args(annotation) or [annotation]  # bool | Literal["auto"] -> bool, Literal["auto"]; int -> int
    return [value for part in parts for value in get_args(part) or [part]]  # Literal["auto"] -> "auto"


def requirement(schema: type, name: str) -> str:
    """What a key's value must be: "a whole number or None, at least 1"."""
    kinds = " or ".join(TYPE_NAMES.get(value, value) for value in allowed_values(schema, name))
    limits = " and ".join(f"{phrase} {bound:g}" for phrase, _, bound in keys(schema)[name].metadata["limits"])
    return f"{kinds}, {limits}" if limits else kinds


def help_text(schema: type) -> str:
    """The examples of the program's docstring, then each key with its default, its meaning and what it must be."""
    lines = [f"usage: {Path(sys.argv[0]).name} [config/NAME.py ...] [--key=value ...]", ""]
    lines += re.findall("^    .*", sys.modules[schema.__module__].__doc__ or "", re.MULTILINE)
    lines += ["", schema.__doc__]
    lines += ["The defaults, which recipes (Python files that assign keys) and --key=value override:"]
    for name, field in keys(schema).items():
        if field.metadata["group"]:
            lines += ["", f"{field.metadata['group']}:"]
        head, meaning = f"  --{name} {field.default}", field.metadata["meaning"]
        if str not in allowed_values(schema, name):
            meaning += f" ({requirement(schema, name)})"
        meaning = "\n".join(textwrap.fill(line, 120 - 34) for line in meaning.splitlines())
        lines.append(f"{head:<32}  {textwrap.indent(meaning, ' ' * 34).lstrip()}")
    return "\n".join(lines) + "\n"


def no_recipe(schema: type, word: str) -> ConfigError:
    """The error for a word of the command that is neither a key nor a recipe."""
    files = [file.relative_to(base) for base in (Path(), PROGRAMS) for file in (base / "config").rglob("*.py")]
    recipes = [file.as_posix() for file in files if file.name != "__init__.py"]
    if "input" in keys(schema) and Path(word).exists():  # prepare.py mine.txt
        hint = f", did you mean {flag('dataset', Path(word).stem)} {flag('input', word)}?"
    else:
        hint = did_you_mean(word, recipes + [f"--{name}" for name in keys(schema)])
    if word.endswith(".py"):
        return ConfigError(f"there is no recipe {word}{hint}")
    return ConfigError(f"{word} is neither --key=value nor a recipe (NAME.py){hint}")


def key_hint(schema: type, name: str, prefix: str = "") -> str:
    """Our name of a key that another program calls `name`, else the closest of ours, else nothing."""
    for ours, field in keys(schema).items():
        if name in field.metadata["also"]:
            return f": it is {prefix}{ours}"
    return did_you_mean(name, keys(schema), prefix)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def flag(name: str, value: object) -> str:
    """--name=value, quoted so that it can be pasted into a shell."""
    return f"--{name}={shlex.quote(str(value))}"


# The end: an error becomes one line and an exit status


@contextmanager
def explained(what: str, advice: str = "", kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn any exception that an untrusted file raises into one line: {what} ({class}: {message}){advice}.

    Errors that are clear already pass unchanged: a UserError, the system's (they name the file), a missing package, too
    little memory.
    """
    try:
        yield
    except (UserError, ModuleNotFoundError, MemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic in tokenizers' Rust code is not an Exception
        # Only the system's errors have a number; libraries raise OSError without one.
        if getattr(error, "errno", None) or re.search(OUT_OF_MEMORY, str(error)):
            raise
        reason = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to run the file's code
            reason = "it holds more than tensors and plain values"
        raise kind(f"{what} ({type(error).__name__}: {reason}){advice}") from None


@contextmanager
def as_config_error() -> Iterator[None]:
    """Within the block, a ValueError or a missing file is the user's mistake: raise it as a ConfigError."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from None


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a program with its command-line arguments, then exit. What goes wrong is told in one line on stderr.

    The exit status is what `main` returns (None: 0), or
        2    for a mistake in the command, a recipe or a value: ConfigError
        1    for anything else that the user can mend: UserError, OSError, a missing package, too little memory, a lost
             process
        130  for Ctrl-C
        141  for a closed pipe, without a line
    Any other exception is a bug and shows its traceback.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams lack it
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # a model or a path may have any character
    rank, world_size = 0, 1
    status, problem = 1, ""
    try:
        rank, world_size = rank_and_size()
        ended = main(sys.argv[1:]) or 0
        sys.stdout.flush()  # may fail, on a full disk for one: then the status stays 1
        status = ended
    except BrokenPipeError:  # the reader has seen enough, as in `sample.py | head`
        status = 128 + 13
    except KeyboardInterrupt:
        if rewritable(sys.stderr):
            put("\n", sys.stderr)  # or `say` would erase the last line, of a sample perhaps
        status, problem = 128 + 2, "interrupted; nothing that was saved is lost"
    except UserError as error:
        status, problem = error.status, str(error)
    except OSError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        problem = f"this needs another package: pip install {error.name}"
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
        if re.search(OUT_OF_MEMORY, text):
            problem = "out of memory; try a smaller batch, model or context"
        elif re.search(LOST_PROCESS, text):
            problem = "another process of this run has exited; --init_from=auto resumes from the last checkpoint"
        else:
            raise
    if problem:
        if rank > 0:  # waits to be ended: process 0 tells a mistake that all share, exits, and torchrun ends the others
            with suppress(KeyboardInterrupt):
                time.sleep(5)
        who = f", process {rank}" if world_size > 1 else ""
        say(f"{Path(sys.argv[0]).name}{who}: {' '.join(problem.split())}")
    for stream in (sys.stdout, sys.stderr):
        put("", stream)  # flush them here: at exit Python would complain of a closed pipe
    if world_size > 1:
        os._exit(status)  # at an ordinary exit gloo, cut off from the other processes, may abort: in 1 of 13 runs
    sys.exit(status)


def rank_and_size() -> tuple[int, int]:
    """The number of this process, and how many torchrun has started together: (0, 1) unless WORLD_SIZE is above 1.

    Raises ConfigError where the environment lacks a part of what torchrun sets.
    """
    world_size = os.environ.get("WORLD_SIZE", "")
    if not world_size.isdecimal() or int(world_size) < 2:
        return 0, 1
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        problem = f"WORLD_SIZE={world_size} in the environment, but no {', '.join(missing)}"
        raise ConfigError(f"{problem}: start with torchrun, or unset WORLD_SIZE")
    return int(os.environ["RANK"]), int(world_size)


class StopSignals:
    """Within the block, a signal to stop only sets `received` to its number; the training loop checks it every step.

    The signals are Ctrl-C, SIGTERM, SIGHUP (a closed terminal), and those that Slurm and a CPU time limit send as a
    warning. Ctrl-C after any of them interrupts at once; a repeat of the others changes nothing, for some come twice.
    """

    received = 0

    def __enter__(self) -> "StopSignals":
        self.before = {}  # {signal: the handler that it had}
        names = ["SIGINT", "SIGTERM", "SIGHUP"]
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # sent to a whole job, these end torchrun itself
            names += ["SIGUSR1", "SIGUSR2", "SIGXCPU"]
        for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:  # Windows has two of them
            # One that is ignored stays so, as nohup wants; None means a handler from outside Python.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                with suppress(ValueError):  # raised in any thread but the main one, where Python sets no handlers
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if number == signal.SIGINT and reporting():  # after another signal SIGKILL may follow: lose no time
            with suppress(RuntimeError):  # raised where the signal has interrupted another print
                say(STOPPING)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# The screen: `show` prints results on stdout, `say` errors and `progress.show` progress on stderr; all use `put`


def reporting() -> bool:
    """Whether this is process 0: it alone shows results and progress."""
    return rank_and_size()[0] == 0


def show(text: str) -> None:
    """Print a result on stdout, a line of its own; in process 0 only."""
    if reporting():
        erase_progress()
        put(text + "\n", sys.stdout)


def say(text: str) -> None:
    """Print an error or the answer to Ctrl-C on stderr, a line of its own; in any process."""
    erase_progress()
    put(text + "\n", sys.stderr)


class Progress:
    """Progress of process 0 on stderr: on a terminal one line, rewritten twice a second at most; else a line in 5 s."""

    shown = -math.inf  # the time of the last one

    def show(self, text: str) -> None:
        on_terminal = rewritable(sys.stderr)
        if reporting() and time.monotonic() - self.shown > (0.5 if on_terminal else 5):
            self.shown = time.monotonic()
            row = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be erased
            put(ERASE_LINE + row if on_terminal else text + "\n", sys.stderr)


progress = Progress()


def erase_progress() -> None:
    if rewritable(sys.stderr):
        put(ERASE_LINE, sys.stderr)


def rewritable(stream: TextIO) -> bool:
    """Whether the stream is a terminal, where a line can be erased; a notebook's streams may lack `isatty`."""
    return hasattr(stream, "isatty") and stream.isatty()


def put(text: str, stream: TextIO) -> None:
    """Print `text` as it is, at once. A terminal that is gone or a full disk stops the output, not the training.

    sample.py prints its text with `print` instead, so that `run` learns of a closed pipe.
    """
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        with suppress(OSError, AttributeError):  # not every stream is a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
