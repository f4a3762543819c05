"""What config/ promises to a user of any program.

Settings: the command wins over recipes, these over the defaults, the last over the first; a value has its key's type
and is within its limits, and a mistake is named with what is wrong, what was found and what to do. The end: one line
on stderr and an exit status of 0, 1, 2, 130 or 141. Signals to stop are noted, not obeyed at once. The screen:
results on stdout, progress on stderr, both of process 0, in a terminal, a pipe or a notebook. And the recipes.
"""

import dataclasses
import itertools
import os
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU
from typing import Literal

import pytest
import torch
from conftest import REPOSITORY, STOPPING, command, tiny

import train
from config import ConfigError, Progress, UserError, convert, explained, key, put, rank_and_size, read, run, show
from prepare import PrepareConfig
from sample import SampleConfig
from train import TrainConfig


@dataclasses.dataclass
class Example:
    """What it is for."""

    size: int = key(6, "how big", also="length width")
    rate: float = key(0.5, "how fast, in % of the usual")
    name: str = key("a", "what it is called")
    on: bool = key(True, "whether")
    limit: int | None = key(None, "from when to when", least=1, below=100)
    share: float = key(0.5, "how much", above=0, most=1)
    mode: Literal["fast", "safe"] = key("fast", "how")
    compile: Literal["auto"] | bool = key("auto", "when")

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size must be at least 0, found {self.size}")


def recipe(text, name="recipe.py"):
    Path(name).write_text(text)
    return name


# Settings


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", {}), ("--size=7", {"size": 7}), ("--size 7 --mode safe", {"size": 7, "mode": "safe"}),
        ("--size=1 --size=2", {"size": 2}), ("--rate -1", {"rate": -1.0}), ("--name=a=b", {"name": "a=b"}),
        ("--name=", {"name": ""}), ("--compile --size=7", {"compile": True, "size": 7}),
        ("--size=7 --compile", {"compile": True, "size": 7}), ("--compile 0", {"compile": False}),
        ("--compile recipe.py --on=0", {"compile": True, "rate": 0.1, "on": False}),
    ],
)  # fmt: skip
def test_keys_override_defaults(folder, argv, expected):
    recipe("rate = 0.1")
    config = read(Example, argv.split())
    assert config == dataclasses.replace(Example(), **expected)
    assert config.given == {*expected}  # what is typed, and what a recipe sets


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("size", "1e3", 1000), ("size", "1_000", 1000), ("size", "9223372036854775807", 2**63 - 1), ("size", 7.0, 7),
        ("rate", "1e-3", 1e-3), ("rate", "2", 2.0), ("rate", 2, 2.0),
        ("name", "~/a", os.path.expanduser("~/a")), ("name", "~", "~"),  # not every text is a path
        ("name", "None", "None"), ("name", "1", "1"),
        ("on", "False", False), ("on", "false", False), ("on", "0", False), ("on", "1", True), ("on", False, False),
        ("limit", "1", 1), ("limit", "99", 99), ("limit", "None", None), ("limit", None, None), ("share", "1", 1.0),
        ("mode", "safe", "safe"), ("compile", "auto", "auto"), ("compile", "True", True), ("compile", False, False),
    ],
)  # fmt: skip
def test_a_value_has_the_type_of_its_key(name, value, expected):
    """Text comes from the command, anything else from a recipe or a checkpoint."""
    found = convert(Example, name, value, f"--{name}")
    assert (found, type(found)) == (expected, type(expected))


WHOLE, LIMIT = "a whole number", "a whole number or None, at least 1 and below 100"


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("size", "big", WHOLE), ("size", "6.5", WHOLE), ("size", "nan", WHOLE), ("size", "1e999999999", WHOLE),
        ("size", True, WHOLE), ("size", None, WHOLE), ("size", [7], WHOLE), ("limit", "x", LIMIT), ("limit", 0, LIMIT),
        ("limit", "100", LIMIT), ("limit", 0.0, LIMIT), ("share", "0", "a number, above 0 and at most 1"),
        ("rate", float("nan"), "a number"), ("rate", True, "a number"), ("rate", "fast", "a number"),
        ("name", 5, "text"), ("name", ["a"], "text"), ("on", "yes", "True/False"),
        ("mode", "slow", "fast or safe"), ("compile", "maybe", "auto or True/False"),
    ],
)  # fmt: skip
def test_a_value_that_its_key_cannot_have_is_named_with_what_it_must_be(name, value, needed):
    with pytest.raises(ConfigError) as error:
        convert(Example, name, value, f"ckpt.pt: {name}")
    assert str(error.value) == f"ckpt.pt: {name} must be {needed}, found {value!r}"


def test_the_command_wins_over_recipes_the_last_over_the_first_and_each_over_the_one_that_it_comes_after(folder):
    Path("more").mkdir()
    recipe("size = 1; rate = 0.1; share = 0.1; name = 'first'", "more/first.py")
    recipe("_after = 'first.py'; size = 2; name = 'second'", "more/second.py")
    third = recipe("_after = 'second.py'; name = 'third'", "more/third.py")
    config = read(Example, ["--name=key", third])
    assert (config.size, config.rate, config.share, config.name) == (2, 0.1, 0.1, "key")
    own = "import os.path\nfrom math import pi, tau as turn\n_base = 3\ndef twice(x): return 2 * x\n"  # are no keys
    last = recipe(own + "name = 'last'; size = twice(_base)")
    assert read(Example, [third, last]) == Example(6, 0.1, "last", share=0.1)


def test_a_recipe_beside_the_program_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(TrainConfig, ["config/lecture/1_bigram.py"]).model == "bigram"
    Path("config").mkdir()
    recipe("n_layer = 3", "config/shakespeare_char_cpu.py")  # one's own comes first
    assert read(TrainConfig, ["config/shakespeare_char_cpu.py"]).n_layer == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--sise=7", "unknown key --sise, did you mean --size?"),
        ("-size=7", "unknown key -size, did you mean --size?"),
        ("--xyzzy=7", "unknown key --xyzzy; --help lists them all"),
        ("--width 3", "unknown key --width: it is --size"),  # as other programs call it
        ("--size", "--size needs a value, a whole number"),
        ("--name --size=7", "--name needs a value, text"),
        ("--on yes", "--on must be True/False, found 'yes'"),
        ("--size=-1", "size must be at least 0, found -1"),
        ("nothing.py", "there is no recipe nothing.py"),
        ("config", "config is neither --key=value nor a recipe (NAME.py)"),
    ],
)
def test_mistakes_in_the_command(folder, argv, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        read(Example, argv.split())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sise = 7", "unknown key sise, did you mean size?"),
        ("length = 3", "unknown key length: it is size"),
        ("other = 5", "unknown key other; names of your own begin with _"),
        ("size = 7.5", "size must be a whole number, found 7.5"),
        ("\nsize = (7", "SyntaxError: '(' was never closed (recipe.py, line 2)"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("_after = 'recipe.py'", "_after leads back to it"),
    ],
)
def test_mistakes_in_a_recipe(folder, text, problem):
    with pytest.raises(ConfigError, match=f"^recipe.py: {re.escape(problem)}$"):
        read(Example, [recipe(text)])


def test_a_text_after_prepare_py_is_answered_with_the_command_that_prepares_it(folder):
    Path("my texts").mkdir()
    with pytest.raises(ConfigError, match=r"did you mean --dataset='my texts' --input='my texts'\?$"):
        read(PrepareConfig, ["my texts"])


def test_what_other_programs_call_a_key_is_known():
    """nanoGPT's keys that are called otherwise here, and the words that are typed most."""
    for schema, names in ((TrainConfig, "wandb_log backend resume gpu lr"), (SampleConfig, "model prompt length")):
        also = [name for field in dataclasses.fields(schema) for name in field.metadata["also"]]
        assert {*names.split()} <= {*also}


@pytest.mark.parametrize("schema", [Example, PrepareConfig, TrainConfig, SampleConfig])
def test_help_prints_every_key_with_default_and_meaning(schema, capsys):
    with pytest.raises(SystemExit) as end:
        read(schema, ["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    help = " ".join(out.split())
    for field in dataclasses.fields(schema):
        assert f"--{field.name} {field.default} {' '.join(field.metadata['meaning'].split())}" in help
        for line in field.metadata["meaning"].splitlines():  # a value that has a line keeps it
            assert re.search(rf"(^|  ){re.escape(line.split(': ')[0])}", out, re.MULTILINE)
    if schema is Example:
        assert "from when to when (a whole number or None, at least 1 and below 100)" in help
    else:  # examples come before the keys
        first_key = out.index(f"\n  --{dataclasses.fields(schema)[0].name} ")
        assert out.index(f"    python {schema.__module__}.py") < out.index(schema.__doc__.split(".")[0]) < first_key


# The end


class Stream:
    """A notebook's: it has no more than this."""

    text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def raising(error):
    """A `main` that fails, as if a file were at fault."""

    def main(argv):
        with explained("the file is damaged", "; make it anew", kind=ConfigError):
            raise error

    return main


@pytest.fixture
def ended(capsys, monkeypatch):
    """Runs a `main` as train.py runs its own, to the end: the exit status, and what stands on stderr."""

    def ended(main):
        monkeypatch.setattr("config.os._exit", sys.exit)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        with pytest.raises(SystemExit) as end:
            run(main)
        return end.value.code, capsys.readouterr().err

    return ended


def test_a_mistake_is_one_line_on_stderr_and_status_2(folder):
    ended = command("prepare.py", "--nonsense=1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "prepare.py: unknown key --nonsense; --help lists them all\n"


MEMORY = "out of memory; try a smaller batch, model or context"
LOST = "another process of this run has exited; --init_from=auto resumes from the last checkpoint"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("a mistake"), 2, "a mistake"),
        (UserError("a problem\nof two lines"), 1, "a problem of two lines"),
        (FileNotFoundError(2, "No such file", "x"), 1, "[Errno 2] No such file: 'x'"),
        (ModuleNotFoundError(name="transformers"), 1, "this needs another package: pip install transformers"),
        (KeyboardInterrupt(), 130, "interrupted; nothing that was saved is lost"),
        (MemoryError(), 1, MEMORY),
        (RuntimeError("std::bad_alloc"), 1, MEMORY),
        (ValueError("a\nb"), 2, "the file is damaged (ValueError: a); make it anew"),
        (OSError("a library's"), 2, "the file is damaged (OSError: a library's); make it anew"),
        (BaseException("a panic"), 2, "the file is damaged (BaseException: a panic); make it anew"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_status(ended, error, status, line):
    """The file is at fault only where nothing else is."""
    assert ended(raising(error)) == (status, f"train.py: {line}\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("DefaultCPUAllocator: can't allocate memory", MEMORY),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", MEMORY),
        ("Connection closed by peer [127.0.0.1]:33000", LOST),
        ("Read error [127.0.0.1]:33000: Connection reset by peer", LOST),
        ("writev [127.0.0.1]:33000: Broken pipe", LOST),
        ("Timed out waiting 1800000ms for recv operation to complete", LOST),
    ],
)
def test_what_torch_says_in_many_words_is_told_in_ours(ended, words, line):
    def main(argv):
        raise RuntimeError(words)

    assert ended(main) == (1, f"train.py: {line}\n")


def test_the_exit_status_is_what_main_returns_and_a_bug_shows_its_traceback(ended):
    assert ended(lambda argv: None) == (0, "")
    assert ended(lambda argv: 143) == (143, "")
    with pytest.raises(RuntimeError):
        run(lambda argv: torch.ones(2) @ torch.ones(3))


def test_a_model_that_no_memory_holds_is_one_line(ended, dataset):
    """Here the words are torch's own."""
    status, errors = ended(lambda _: train.main(["--n_embd=6000000000", "--n_layer=1", "--device=cpu"]))
    assert (status, errors) == (1, f"train.py: {MEMORY}\n")


def test_ctrl_c_in_a_terminal_leaves_the_text_that_stands_on_its_last_line(ended, monkeypatch):
    monkeypatch.setattr("config.rewritable", lambda stream: True)
    line = "train.py: interrupted; nothing that was saved is lost\n"
    assert ended(raising(KeyboardInterrupt())) == (130, f"\n\r\033[K{line}")


def test_a_reader_who_has_seen_enough_ends_the_program_without_a_line(ended, monkeypatch):
    class Closed(Stream):
        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert ended(lambda argv: print("text")) == (141, "")


# Several processes

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def in_environment(monkeypatch, environment):
    for name in TWO:
        monkeypatch.setenv(name, environment.get(name, ""))  # an empty one counts as none


@pytest.mark.parametrize("rank", [0, 1])
def test_process_0_shows_results_and_each_says_its_own_error_the_others_later(ended, capsys, monkeypatch, rank):
    in_environment(monkeypatch, TWO | {"RANK": str(rank)})
    slept = []
    monkeypatch.setattr("config.time.sleep", slept.append)
    show("step 0")
    Progress().show("step 1")
    assert capsys.readouterr() == (("", "") if rank else ("step 0\n", "step 1\n"))
    assert ended(raising(ConfigError("a mistake"))) == (2, f"train.py, process {rank}: a mistake\n")
    assert slept == [5] * rank


def test_without_a_world_size_above_1_this_is_one_process_whatever_its_rank(monkeypatch):
    for world_size in ("", "0", "1", "x"):
        in_environment(monkeypatch, TWO | {"RANK": "3", "WORLD_SIZE": world_size})
        assert rank_and_size() == (0, 1)


@pytest.mark.parametrize("missing", [["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"], ["LOCAL_RANK"]])
def test_what_is_missing_of_an_environment_of_several_processes_is_named(ended, monkeypatch, missing):
    in_environment(monkeypatch, TWO | dict.fromkeys(missing, ""))
    problem = f"WORLD_SIZE=2 in the environment, but no {', '.join(missing)}: start with torchrun, or unset WORLD_SIZE"
    assert ended(lambda argv: None) == (2, f"train.py: {problem}\n")


# Signals


SIGNALLED = """if True:
    import os, signal, sys
    from config import StopSignals

    def handlers():
        return {number: signal.getsignal(number) for number in signal.valid_signals()}

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, print)
    before = handlers()
    with StopSignals() as signals:
        for number in map(int, sys.argv[1:]):
            os.kill(os.getpid(), number)
            print(int(signals.received), flush=True)
    assert handlers() == before
"""
NOTED = [SIGTERM, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU]


@pytest.mark.parametrize(
    ("numbers", "environment", "status", "received"),
    [
        ([SIGHUP, *NOTED], {}, 0, [0, *NOTED]),  # nohup ignores SIGHUP
        ([SIGINT, SIGINT], {}, -SIGINT, [SIGINT]),
        ([SIGTERM, SIGINT], {}, -SIGINT, [SIGTERM]),
        ([SIGTERM, SIGUSR1], {"TORCHELASTIC_RUN_ID": "none"}, -SIGUSR1, [SIGTERM]),  # which torchrun does not pass on
    ],
)
def test_signals_to_stop_are_noted_and_ctrl_c_after_one_ends_at_once(numbers, environment, status, received):
    """But for one that was ignored, as nohup wants. The handlers of before come back."""
    argv = [sys.executable, "-c", SIGNALLED, *(str(int(number)) for number in numbers)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    ended = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert (ended.returncode, [*map(int, ended.stdout.split())]) == (status, received)
    assert ended.stderr.startswith(STOPPING) == (numbers[0] == SIGINT)


# The screen


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.5), (False, 5)])
def test_progress_is_shown_by_time_on_a_terminal_in_one_line(capsys, monkeypatch, terminal, seconds):
    monkeypatch.setattr("config.time.monotonic", lambda: tick / 10)
    monkeypatch.setattr("config.shutil.get_terminal_size", lambda: os.terminal_size((10, 24)))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    progress = Progress()
    for tick in range(200):  # noqa: B007
        progress.show("0123456789")
    shown = capsys.readouterr().err
    assert shown.count("012345678") == pytest.approx(20 / seconds, rel=0.2)
    assert ("\n" in shown, "9" in shown) == (not terminal, not terminal)  # a full line would wrap
    assert shown.startswith("\r\033[K0" if terminal else "0")
    show("a result")
    assert capsys.readouterr() == ("a result\n", "\r\033[K" if terminal else "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_stops_the_output_not_the_training():
    with open("/dev/full", "w") as stream:
        put("lost\n", stream)
        put("lost, too\n", stream)


def test_the_programs_run_in_a_notebook(dataset, monkeypatch):
    """In any thread of it."""
    statuses = []

    def main():
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / sys.argv[0]), run_name="__main__")
        statuses.append(end.value.code)

    for argv in (["prepare.py"], ["train.py", *tiny(max_iters=2)], ["sample.py"], ["sample.py", "--top_k=0"]):
        for name, value in (("argv", argv), ("stdout", Stream()), ("stderr", Stream())):
            monkeypatch.setattr(sys, name, value)
        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
    assert statuses == [0, 0, 0, 2]
    assert sys.stderr.text == "sample.py: --top_k must be a whole number or None, at least 1, found '0'\n"


# Recipes

NANOGPTS = {
    "optimizer": "adamw", "batch_size": 64, "dropout": 0.2, "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100,
    "max_iters": 5000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0,
}  # fmt: skip


def test_every_recipe_writes_to_a_folder_of_its_own_and_only_those_of_the_reference_follow_its_tuning():
    tuned = {name for name, value in NANOGPTS.items() if getattr(TrainConfig(), name) != value}
    configs = {}
    for path in (REPOSITORY / "config").rglob("[!_]*.py"):
        name = path.relative_to(REPOSITORY / "config").with_suffix("").as_posix()
        config = configs[name] = read(TrainConfig, [str(path)])
        assert config.out_dir == ("out" if name == "shakespeare_char" else f"out/{name}")
        assert config.micro_batch_size(2) >= 1
        assert path.read_text().startswith("# ")
        assert tuned <= config.given or re.fullmatch("shakespeare_char(_cpu.*)?", name), name
    assert configs["shakespeare_char"] == TrainConfig()
    assert vars(configs["shakespeare_char_nanogpt"]).items() >= NANOGPTS.items()


def test_each_rung_of_the_lecture_adds_its_idea_to_the_last():
    paths = sorted((REPOSITORY / "config/lecture").glob("*.py"))
    rungs = [dataclasses.asdict(read(TrainConfig, [str(path)])) for path in paths]
    added = [{name: new[name] for name in new if new[name] != old[name]} for old, new in itertools.pairwise(rungs)]
    for step in added:
        del step["out_dir"]
    one_head = {"n_layer": 1, "n_head": 1, "n_embd": 32, "feed_forward": False, "residual": False, "layer_norm": False}
    assert added[:5] == [
        {"model": "gpt", "learning_rate": 1e-2, **one_head},
        {"n_head": 4},
        {"feed_forward": True},
        {"n_layer": 3, "residual": True, "learning_rate": 5e-3},
        {"layer_norm": True},
    ]
    lectures = {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 64, "block_size": 256, "dropout": 0.2}
    assert rungs[6].items() >= lectures.items()
    assert {(rung["batch_size"], rung["block_size"]) for rung in rungs[:6]} == {(32, 8)}
    assert {rung["max_iters"] for rung in rungs} == {5000}


def test_gpt2_124m_divides_among_powers_of_two(monkeypatch):
    for world_size in (1, 2, 8, 16, 32):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        config = read(TrainConfig, ["config/gpt2_124m.py"])
        assert config.micro_batch_size(world_size) == 16
        tokens = config.batch_size * config.block_size  # in a step
        assert tokens == 2**19
        assert tokens * config.max_iters == pytest.approx(10e9, rel=1e-4)
        assert tokens * config.eval_iters == 10_485_760  # what the field evaluates
