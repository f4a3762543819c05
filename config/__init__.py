"""How a program is told what to do, how it ends, and what it shows.

Each program has one dataclass. A field is a key: its name, type, default, limits and meaning stand there and nowhere
else, and `--help` prints them. A recipe is a Python file: the names that it assigns are keys.
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
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from operator import ge, gt, le, lt
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TextIO, get_args, get_type_hints

BESIDE = Path(__file__).parent.parent  # the programs; a recipe that is not here may be there
# What text may mean, where the key's type allows it.
WORDS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False, "None": None}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True/False", NoneType: "None"}
LIMITS = {"least": ("at least", ge), "above": ("above", gt), "most": ("at most", le), "below": ("below", lt)}
OUT_OF_MEMORY = "MemoryError|out of memory|allocate memory|bad_alloc"
# What torch raises when something outside the program fails, and what to tell the user.
BREAKDOWNS = {
    OUT_OF_MEMORY: "out of memory; try a smaller batch, model or context",
    "closed by peer|reset by peer|Broken pipe|Timed out waiting": "another process of this run has exited; "
    "--init_from=auto resumes from the last checkpoint",
}
STOPPING = "stopping, with a checkpoint, after this step or evaluation; Ctrl-C again: at once, without one"
ERASE_LINE = "\r\033[K"


class UserError(Exception):
    """What went wrong and what to do, in one line for the person at the keyboard. Ends the program with `status`."""

    status = 1


class ConfigError(UserError):
    """A mistake in the command, a recipe or a value: found before anything was done."""

    status = 2


# Settings: a recipe overrides the defaults and recipes before it; a --key=value overrides all, wherever it stands


def key(default: Any, meaning: str, group: str | None = None, also: str = "", **limits: float) -> Any:
    """A field of a program's dataclass. Limits of a number: `least` or `above`, `most` or `below`.

    group: --help's title of the keys from this one on. also: names that other programs give the key, with spaces
    between them; who types one is told ours.
    """
    metadata = {"meaning": meaning, "group": group, "also": also.split(), "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


def read(schema: type, argv: list[str]) -> Any:
    """Build `schema`, whose fields are keys, from its defaults, recipes and --key=value. Raises ConfigError.

    The result's attribute `given` holds the names of the keys that a recipe or the command sets.
    """
    if {"-h", "--help"} & {*argv}:
        put(help_text(schema), sys.stdout)
        sys.exit(0)
    words, recipe_values, typed_values = [*argv], {}, {}
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            recipe_values |= recipe(schema, word)
            continue
        if not word.startswith("--") or name not in get_type_hints(schema):
            hint = instead_of(schema, name, "--") or "; --help lists them all"
            raise ConfigError(f"unknown key {word.partition('=')[0]}{hint}")
        if not equals:  # --key value, or --switch alone
            alone = not words or words[0].startswith("--")
            if bool in options(schema, name) and (alone or words[0].endswith(".py")):  # --switch config/NAME.py
                value = "True"
            elif alone:
                raise ConfigError(f"--{name} needs a value, {description(schema, name)}")
            else:
                value = words.pop(0)
        typed_values[name] = convert(schema, name, value, f"--{name}")
    values = recipe_values | typed_values
    with as_config_error():
        config = schema(**values)
    config.given = frozenset(values)
    return config


def recipe(schema: type, path: str, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Run the recipe and return the keys that it assigns; _names, imports and functions are its own business.

    `_after = "NAME.py"` names the recipe beside it that it starts from; those `seen` have started from this one.
    """
    file = Path(path) if Path(path).is_file() else BESIDE / path
    if file.suffix != ".py" or not file.is_file():
        raise no_recipe(schema, path)
    if file in seen:
        raise ConfigError(f"{file}: _after leads back to it")
    try:
        names = runpy.run_path(str(file))
        symbols = symtable.symtable(file.read_bytes(), str(file), "exec").get_symbols()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from None
    keys = get_type_hints(schema).keys()
    # Its imports, functions and classes are not meant as keys.
    own = {symbol.get_name() for symbol in symbols if symbol.is_imported() or symbol.is_namespace()}
    if unknown := [name for name in names.keys() - keys - own if not name.startswith("_")]:
        name = min(unknown)
        raise ConfigError(f"{file}: unknown key {name}{instead_of(schema, name) or '; names of your own begin with _'}")
    values = {name: convert(schema, name, names[name], f"{file}: {name}") for name in names.keys() & keys}
    if "_after" in names:
        before = file.parent / Path(str(names["_after"])).name
        return recipe(schema, str(before), (*seen, file)) | values
    return values


def convert(schema: type, name: str, value: Any, where: str) -> Any:
    """`value`, as typed or in a recipe or a checkpoint, as the key's type. Raises ConfigError "{where} must be ..."."""
    kinds, limits, text = options(schema, name), schema.__dataclass_fields__[name].metadata["limits"], str(value)
    if text in WORDS and type(WORDS[text]) in kinds:
        return WORDS[text]
    if isinstance(value, str) and (value in kinds or str in kinds):
        return os.path.expanduser(value) if value.startswith("~/") else value
    with suppress(ValueError):
        number = float(text)
        if int in kinds and number.is_integer():  # 1e3 is a whole number, too
            number = int(Decimal(text))  # a float has 53 bits only
        within = all(LIMITS[limit][1](number, bound) for limit, bound in limits.items())
        if type(number) in kinds and math.isfinite(number) and within:
            return number
    raise ConfigError(f"{where} must be {description(schema, name)}, found {value!r}")


def options(schema: type, name: str) -> list:
    """The types and words that a key may have: bool | Literal["auto"] -> [bool, "auto"]."""
    kind = get_type_hints(schema)[name]
    return [option for part in get_args(kind) or [kind] for option in get_args(part) or [part]]


def description(schema: type, name: str) -> str:
    """What a key must be: "a whole number or None, at least 1"."""
    kinds = " or ".join(TYPE_NAMES.get(option, option) for option in options(schema, name))
    limits = schema.__dataclass_fields__[name].metadata["limits"]
    bounds = " and ".join(f"{LIMITS[limit][0]} {bound:g}" for limit, bound in limits.items())
    return f"{kinds}, {bounds}" if bounds else kinds


def help_text(schema: type) -> str:
    """The examples of the program's docstring, then each key with its default, its meaning and what it must be."""
    lines = [f"usage: {Path(sys.argv[0]).name} [config/NAME.py ...] [--key=value ...]", ""]
    lines += re.findall("^    .*", sys.modules[schema.__module__].__doc__ or "", re.MULTILINE)
    lines += ["", schema.__doc__]
    lines += ["The defaults, which recipes (Python files that assign keys) and --key=value override:"]
    for field in dataclasses.fields(schema):
        if field.metadata["group"]:
            lines += ["", f"{field.metadata['group']}:"]
        head, meaning, margin = f"  --{field.name} {field.default}", field.metadata["meaning"], " " * 34
        if str not in options(schema, field.name):
            meaning += f" ({description(schema, field.name)})"
        meaning = "\n".join(textwrap.fill(line, 86) for line in meaning.splitlines())
        lines.append(f"{head:<32}  {textwrap.indent(meaning, margin).lstrip()}")
    return "\n".join(lines) + "\n"


def no_recipe(schema: type, word: str) -> ConfigError:
    """The error for a word of the command that is neither a key nor a recipe."""
    files = [file.relative_to(base) for base in (Path(), BESIDE) for file in (base / "config").rglob("*.py")]
    known = [file.as_posix() for file in files if file.name != "__init__.py"]
    known += [f"--{field.name}" for field in dataclasses.fields(schema)]
    hint = did_you_mean(word, known)
    if "input" in schema.__dataclass_fields__ and Path(word).exists():  # prepare.py mine.txt
        hint = f", did you mean {flag('dataset', Path(word).stem)} {flag('input', word)}?"
    if word.endswith(".py"):
        return ConfigError(f"there is no recipe {word}{hint}")
    return ConfigError(f"{word} is neither --key=value nor a recipe (NAME.py){hint}")


def instead_of(schema: type, name: str, prefix: str = "") -> str:
    """What to type instead of a key that does not exist; nothing where that is unknown."""
    ours = {theirs: field.name for field in dataclasses.fields(schema) for theirs in field.metadata["also"]}
    return f": it is {prefix}{ours[name]}" if name in ours else did_you_mean(name, get_type_hints(schema), prefix)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def flag(name: str, value: object) -> str:
    """--name=value, quoted so that it can be pasted into a shell."""
    return f"--{name}={shlex.quote(str(value))}"


# The end


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


@contextmanager
def as_config_error() -> Iterator[None]:
    """A ValueError, or the lack of a file, is a mistake in the command within: a ConfigError of the same words."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from None


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a program. It ends with the exit status that `main` returns, 0 for None, or in one line on stderr and

        2    a mistake in the command, a recipe or a value: ConfigError
        1    whatever else a user can do something about: UserError, OSError, a missing package, too little memory
        130  Ctrl-C; 141, without a line: nobody reads the output any more

    Only a bug shows its traceback.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # a model or a path may have any character
    rank, world_size, status, problem = 0, 1, 1, ""
    try:
        rank, world_size = rank_and_size()
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `sample.py | head`
        status = 128 + 13
    except KeyboardInterrupt:
        put("\n" * rewritable(sys.stderr), sys.stderr)  # what stands there, a sample perhaps, stays
        status, problem = 128 + 2, "interrupted; nothing that was saved is lost"
    except (UserError, OSError) as error:
        status, problem = getattr(error, "status", 1), str(error)
    except ModuleNotFoundError as error:
        problem = f"this needs another package: pip install {error.name}"
    except (MemoryError, RuntimeError) as error:
        meanings = [text for words, text in BREAKDOWNS.items() if re.search(words, f"{type(error).__name__}: {error}")]
        if not meanings:
            raise
        problem = meanings[0]
    if problem:
        if rank > 0:  # most mistakes all processes meet, and torchrun ends the others when process 0 has exited
            with suppress(KeyboardInterrupt):
                time.sleep(5)
        who = f", process {rank}" if world_size > 1 else ""
        say(f"{Path(sys.argv[0]).name}{who}: {' '.join(problem.split())}")
    for stream in (sys.stdout, sys.stderr):
        put("", stream)  # flushes; or Python, at its end, complains of a closed pipe
    if world_size > 1:
        os._exit(status)  # at an ordinary end gloo, cut off from the others, may abort: 1 in 13 did
    sys.exit(status)


def rank_and_size() -> tuple[int, int]:
    """Which process this is, and of how many that torchrun has started together. Raises ConfigError.

    Without WORLD_SIZE above 1 in the environment this is the only one.
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
    """Within the block, signals that ask a program to stop are only noted: the last one's number is `received`.

    These are Ctrl-C, SIGTERM, a closed terminal's SIGHUP, and those that Slurm and a limit of CPU time send first. A
    second Ctrl-C interrupts at once. The others may come twice: kernel and shell both send SIGHUP.
    """

    received = 0

    def __enter__(self) -> "StopSignals":
        self.before = {}
        names = "SIGINT SIGTERM SIGHUP"
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun itself would end of these
            names += " SIGUSR1 SIGUSR2 SIGXCPU"
        for number in [getattr(signal, name) for name in names.split() if hasattr(signal, name)]:  # Windows has two
            # An ignored one, as nohup sets SIGHUP, stays so; None is a handler that Python could not put back.
            settable = signal.getsignal(number) not in (signal.SIG_IGN, None)
            if settable and threading.current_thread() is threading.main_thread():  # in others Python has no signals
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if number == signal.SIGINT and reporting():  # not of the others, which SIGKILL may follow
            with suppress(RuntimeError):  # raised where the signal has interrupted another print
                say(STOPPING)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# The screen


def reporting() -> bool:
    """Whether this is process 0, the one that shows how the run goes."""
    return rank_and_size()[0] == 0


def show(text: str) -> None:
    """Print a line on stdout, in place of a progress line; in process 0 alone."""
    if reporting():
        put(ERASE_LINE * rewritable(sys.stderr), sys.stderr)
        put(text + "\n", sys.stdout)


def say(text: str) -> None:
    """Print a line on stderr, in place of a progress line."""
    put(f"{ERASE_LINE * rewritable(sys.stderr)}{text}\n", sys.stderr)


class Progress:
    """Progress of process 0 on stderr: on a terminal one line, rewritten twice a second at most; else a line in 5 s."""

    shown = -math.inf  # when the last one was

    def show(self, text: str) -> None:
        if reporting() and time.monotonic() - self.shown > (0.5 if rewritable(sys.stderr) else 5):
            self.shown = time.monotonic()
            if rewritable(sys.stderr):  # a line that wraps could not be erased
                put(ERASE_LINE + text[: shutil.get_terminal_size().columns - 1], sys.stderr)
            else:
                put(text + "\n", sys.stderr)


progress = Progress()


def rewritable(stream: TextIO) -> bool:
    """Whether the stream is a terminal, where a line can be erased; a notebook's streams may be any objects."""
    return hasattr(stream, "isatty") and stream.isatty()


def put(text: str, stream: TextIO) -> None:
    """Print it at once, or nothing from now on where the terminal is gone or the disk full: training goes on.

    sample.py prints its text by `print`, so that `run` learns of a closed pipe.
    """
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        with suppress(OSError, AttributeError):  # not every stream is a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
