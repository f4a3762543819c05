import dataclasses
import itertools
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from conftest import REPOSITORY, STOPPING, command, tiny

from config import ConfigError, Progress, convert, explained, key, progress, rank_and_size, read, run, show
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
    limit: int | None = key(None, "at most", least=1, below=100)
    mode: Literal["fast", "safe"] = key("fast", "how")
    compile: Literal["auto"] | bool = key("auto", "when")

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size must be at least 0, found {self.size}")


def recipe(text, name="recipe.py"):
    Path(name).write_text(text)
    return name


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--size=7"], {"size": 7}),
        (["--size", "7"], {"size": 7}),
        (["--size=1", "--size=2"], {"size": 2}),
        (["--rate=1e-3"], {"rate": 1e-3}),
        (["--rate=2"], {"rate": 2.0}),
        (["--size=1e3"], {"size": 1000}),
        (["--size=1_000"], {"size": 1000}),
        (["--size=9223372036854775807"], {"size": 2**63 - 1}),
        (["--name=~/a"], {"name": os.path.expanduser("~/a")}),
        (["--name=~"], {"name": "~"}),  # not every text is a path
        (["--rate", "-1"], {"rate": -1.0}),
        (["--name=a=b"], {"name": "a=b"}),
        (["--name="], {"name": ""}),
        (["--name=None"], {"name": "None"}),
        (["--on=False"], {"on": False}),
        (["--on=false"], {"on": False}),
        (["--on=0"], {"on": False}),
        (["--on=1"], {"on": True}),
        (["--limit=3"], {"limit": 3}),
        (["--limit=3", "--limit=None"], {"limit": None}),
        (["--mode=safe"], {"mode": "safe"}),
        (["--compile=True"], {"compile": True}),
        (["--compile=0"], {"compile": False}),
        (["--compile=auto"], {"compile": "auto"}),
        (["--on", "--size=7"], {"on": True, "size": 7}),
        (["--size=7", "--compile"], {"compile": True, "size": 7}),
        (["--on", "False", "--compile", "auto"], {"on": False, "compile": "auto"}),
    ],
)
def test_keys_override_defaults(argv, expected):
    found = dataclasses.asdict(read(Example, argv))
    assert found == dataclasses.asdict(Example()) | expected
    assert [type(value) for value in found.values()] == [type(v) for v in (found | expected).values()]


def test_recipes_override_defaults_keys_override_recipes_and_the_last_wins(folder):
    first = recipe("size = 1; rate = 0.1; name = 'first'", "first.py")
    second = recipe("size = 2; name = 'second'", "second.py")
    config = read(Example, ["--name=key", first, second])
    assert (config.size, config.rate, config.name) == (2, 0.1, "key")


def test_imports_functions_and_private_names_are_the_recipes_own(folder):
    text = (
        "import os.path\nfrom math import pi, tau as turn\n_base = 3\ndef twice(x): return 2 * x\nsize = twice(_base)\n"
    )
    assert read(Example, [recipe(text)]).size == 6


def test_a_recipe_starts_from_the_one_that_it_comes_after(folder):
    recipe("size = 1; rate = 0.1; name = 'first'", "first.py")
    recipe("_after = 'first.py'; size = 2", "second.py")
    config = read(Example, [recipe("_after = 'second.py'; name = 'third'", "third.py")])
    assert (config.size, config.rate, config.name) == (2, 0.1, "third")
    with pytest.raises(ConfigError, match=r"there is no recipe nothing\.py"):
        read(Example, [recipe("_after = 'nothing.py'")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sise=7"], "unknown key --sise, did you mean --size?"),
        (["--xyzzy=7"], "unknown key --xyzzy; --help lists them all"),
        (["--siz=7"], "unknown key --siz, did you mean --size?"),
        (["-size=7"], "unknown key -size, did you mean --size?"),
        (["--size"], "--size needs a value, a whole number"),
        (["--size=big"], "--size must be a whole number, found 'big'"),
        (["--size=6.5"], "--size must be a whole number, found '6.5'"),
        (["--size=1e999999999"], "--size must be a whole number, found '1e999999999'"),
        (["--size=nan"], "--size must be a whole number, found 'nan'"),
        (["--rate=fast"], "--rate must be a number, found 'fast'"),
        (["--on=yes"], "--on must be True/False, found 'yes'"),
        (["--on", "yes"], "--on must be True/False, found 'yes'"),
        (["--name", "--size=7"], "--name needs a value, text"),
        (["--limit=x"], "--limit must be a whole number or None, at least 1 and below 100, found 'x'"),
        (["--limit=0"], "--limit must be a whole number or None, at least 1 and below 100, found '0'"),
        (["--limit=100"], "--limit must be a whole number or None, at least 1 and below 100, found '100'"),
        (["--mode=slow"], "--mode must be fast or safe, found 'slow'"),
        (["--compile=maybe"], "--compile must be auto or True/False, found 'maybe'"),
        (["--size=-1"], "size must be at least 0, found -1"),
        (["nothing.py"], "there is no recipe nothing.py"),
        (["config"], "config is neither --key=value nor a recipe (NAME.py)"),
        (["--length=3"], "unknown key --length: it is --size"),
        (["--width", "3"], "unknown key --width: it is --size"),
        (
            ["config/lecture/1_bigram"],
            "config/lecture/1_bigram is neither --key=value nor a recipe (NAME.py), did you mean "
            "config/lecture/1_bigram.py?",
        ),
        (["size=3"], "size=3 is neither --key=value nor a recipe (NAME.py), did you mean --size?"),
        (["what=3"], "what=3 is neither --key=value nor a recipe (NAME.py)"),
        (["shakespeare_char.py"], "there is no recipe shakespeare_char.py, did you mean config/shakespeare_char.py?"),
    ],
)
def test_mistakes_in_the_command(folder, argv, message):
    with pytest.raises(ConfigError) as error:
        read(Example, argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise = 7", "recipe.py: unknown key sise, did you mean size?"),
        ("size = 7.5", "recipe.py: size must be a whole number, found 7.5"),
        ("size = True", "recipe.py: size must be a whole number, found True"),
        ("name = 5", "recipe.py: name must be text, found 5"),
        ("name = ['a']", "recipe.py: name must be text, found ['a']"),
        ("rate = None", "recipe.py: rate must be a number, found None"),
        ("mode = 'slow'", "recipe.py: mode must be fast or safe, found 'slow'"),
        ("\nsize = (7", "recipe.py: SyntaxError: '(' was never closed (recipe.py, line 2)"),
        ("size = 1\nrate = 1 / 0\n", "recipe.py: ZeroDivisionError: division by zero"),
        ("import nowhere", "recipe.py: ModuleNotFoundError: No module named 'nowhere'"),
        ("size = [6]", "recipe.py: size must be a whole number, found [6]"),
        ("length = 3", "recipe.py: unknown key length: it is size"),
        ("limit = 0.0", "recipe.py: limit must be a whole number or None, at least 1 and below 100, found 0.0"),
        ("import sys\nsys.exit(0)", "recipe.py: SystemExit: 0"),
        ("other = 5\nanother = 6", "recipe.py: unknown key another; names of your own begin with _"),
        ("_after = 3", "3 is neither --key=value nor a recipe (NAME.py)"),
        ("_after = 'recipe.py'", "recipe.py: _after leads back to it"),
    ],
)
def test_mistakes_in_a_recipe(folder, text, message):
    with pytest.raises(ConfigError) as error:
        read(Example, [recipe(text)])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("size", 7, 7), ("size", 7.0, 7), ("rate", 2, 2.0), ("limit", None, None), ("limit", 3, 3),
        ("on", False, False), ("name", "a", "a"), ("mode", "safe", "safe"), ("compile", True, True),
    ],
)  # fmt: skip
def test_a_value_of_a_checkpoint_has_the_keys_type(name, value, expected):
    found = convert(Example, name, value, f"ckpt.pt: {name}")
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("size", 7.5, "a whole number, found 7.5"), ("size", None, "a whole number, found None"),
        ("size", [7], "a whole number, found [7]"), ("rate", float("nan"), "a number, found nan"),
        ("rate", True, "a number, found True"), ("name", 5, "text, found 5"),
        ("mode", "slow", "fast or safe, found 'slow'"), ("on", "yes", "True/False, found 'yes'"),
        ("limit", 0, "a whole number or None, at least 1 and below 100, found 0"),
    ],
)  # fmt: skip
def test_a_value_of_a_checkpoint_that_the_key_cannot_have_is_named(name, value, problem):
    with pytest.raises(ConfigError) as error:
        convert(Example, name, value, f"ckpt.pt: {name}")
    assert str(error.value) == f"ckpt.pt: {name} must be {problem}"


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
    assert str(2**63) not in help
    if schema is not Example:  # three examples come before the keys, which are in groups
        examples = out.index(f"    python {schema.__module__}.py")
        first_key = out.index(f"\n  --{dataclasses.fields(schema)[0].name} ")
        assert examples < out.index(schema.__doc__.split(".")[0]) < first_key
    if schema is TrainConfig:
        titles = ["run:", "model:", "batch and optimizer:", "evaluation:", "machine:"]
        assert re.findall(r"^[a-z ]+:$", out, re.MULTILINE) == titles


def test_a_recipe_follows_a_bare_key(folder):
    name = recipe("size = 3")
    assert read(Example, ["--on", name, "--compile"]) == Example(size=3, compile=True)


def test_a_recipe_beside_the_program_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(TrainConfig, ["config/lecture/1_bigram.py"]).model == "bigram"
    Path("config").mkdir()
    recipe("n_layer = 3", "config/shakespeare_char_cpu.py")  # one's own comes first
    assert read(TrainConfig, ["config/shakespeare_char_cpu.py"]).n_layer == 3
    with pytest.raises(ConfigError, match=r"no recipe config/gpt2_125m.py, did you mean config/gpt2_124m.py\?$"):
        read(TrainConfig, ["config/gpt2_125m.py"])


@pytest.mark.parametrize(
    ("schema", "argv", "hint"),
    [
        (PrepareConfig, ["mine.txt"], "(NAME.py), did you mean --dataset=mine --input=mine.txt?"),
        (PrepareConfig, ["my texts"], "(NAME.py), did you mean --dataset='my texts' --input='my texts'?"),
        (TrainConfig, ["max_iters=100"], "did you mean --max_iters?"),
        (TrainConfig, ["shakespeare_char"], "did you mean config/shakespeare_char.py?"),
        (SampleConfig, ["--model=out"], "unknown key --model: it is --init_from"),
        (TrainConfig, ["--resume"], "unknown key --resume: it is --init_from"),
        (TrainConfig, ["--gpu"], "unknown key --gpu: it is --device"),
        (TrainConfig, ["--lr=1"], "unknown key --lr: it is --learning_rate"),
        (SampleConfig, ["--prompt=a"], "unknown key --prompt: it is --start"),
        (SampleConfig, ["--length=9"], "unknown key --length: it is --max_new_tokens"),
    ],
)
def test_what_users_of_other_programs_type_has_a_hint(folder, schema, argv, hint):
    Path("mine.txt").write_text("text")
    Path("my texts").mkdir()
    with pytest.raises(ConfigError, match=re.escape(hint)):
        read(schema, argv)


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        (
            TrainConfig,
            "out_dir eval_interval log_interval eval_iters eval_only init_from wandb_log dataset "
            "gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias learning_rate "
            "max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device "
            "dtype compile",
        ),
        (SampleConfig, "init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype"),
    ],
)
def test_every_key_of_nanogpt_that_has_a_counterpart_is_known_or_answered_with_it(schema, names):
    also = [name for field in dataclasses.fields(schema) for name in field.metadata["also"]]
    assert {*names.split()} <= {field.name for field in dataclasses.fields(schema)} | {*also}


def test_ctrl_c_in_a_terminal_leaves_the_text_that_stands_on_its_last_line(capsys, monkeypatch):
    def main(argv):
        print("half a li", end="")
        raise KeyboardInterrupt

    monkeypatch.setattr("config.rewritable", lambda stream: True)
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130
    out, errors = capsys.readouterr()
    assert out == "half a li"
    assert re.fullmatch(r"\n(\r\x1b\[K)?.*: interrupted; nothing that was saved is lost\n", errors)


@pytest.mark.parametrize(("rank", "local_rank", "shown"), [(0, 0, True), (1, 0, False), (1, 1, False)])
def test_of_all_machines_together_one_process_shows_how_the_run_goes(capsys, monkeypatch, rank, local_rank, shown):
    monkeypatch.setattr(progress, "shown", -math.inf)
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "somewhere")
    show("step 0")
    progress.show("step 1")
    assert capsys.readouterr() == (("step 0\n", "step 1\n") if shown else ("", ""))


@pytest.mark.parametrize("program", ["prepare.py", "train.py", "sample.py"])
def test_a_mistake_is_one_line_on_stderr_and_status_2(folder, program):
    ended = command(program, "--nonsense=1")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == f"{program}: unknown key --nonsense; --help lists them all\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_every_lack_of_memory_is_told_as_one(capsys, error):
    def main(argv):
        with explained("a file of no fault"):
            raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err.endswith(": out of memory; try a smaller batch, model or context\n")


@pytest.mark.parametrize(
    "words",
    [
        "Connection closed by peer [127.0.0.1]:33000",
        "Read error [127.0.0.1]:33000: Connection reset by peer",
        "writev [127.0.0.1]:33000: Broken pipe",
        "Timed out waiting 1800000ms for recv operation to complete",
    ],
)
def test_all_that_gloo_says_of_a_lost_process_is_told_as_one(capsys, words):
    def main(argv):
        raise RuntimeError(words)

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 1
    assert ": another process of this run has exited; " in capsys.readouterr().err


def test_out_of_memory_is_one_line_and_status_1(folder):
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    (folder / "data" / "shakespeare_char" / "input.txt").write_text("To be, or not to be. " * 500)
    ended = command("train.py", "--n_embd=6000000000", "--n_layer=1", "--device=cpu")
    assert ended.returncode == 1
    assert ended.stderr == "train.py: out of memory; try a smaller batch, model or context\n"


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": ""}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK"),
    ],
)
@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_what_is_missing_of_an_environment_of_several_processes_is_named(folder, program, environment, missing):
    ended = command(program, "--device=cpu", env=os.environ | environment)
    assert ended.returncode == 2
    problem = f"WORLD_SIZE=2 in the environment, but no {missing}: start with torchrun, or unset WORLD_SIZE"
    assert ended.stderr == f"{program}: {problem}\n"


@pytest.mark.parametrize("world_size", [None, "", "0", "1", "x"])
def test_without_a_world_size_above_1_this_is_one_process_whatever_its_rank(folder, monkeypatch, world_size):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert rank_and_size() == (0, 1)
    ended = command("sample.py", "--out_dir=nowhere")
    assert ended.returncode == 2
    assert ended.stderr.startswith("sample.py: there is no checkpoint in nowhere")


TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(("rank", "pauses"), [(0, []), (1, [5])])
def test_each_process_says_its_own_error_with_its_rank_the_others_after_process_0(capsys, monkeypatch, rank, pauses):
    def main(argv):
        raise ConfigError("a mistake")

    slept = []
    for name, value in (TWO | {"RANK": str(rank)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("config.time.sleep", slept.append)
    monkeypatch.setattr("config.os._exit", sys.exit)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"train.py, process {rank}: a mistake\n"
    assert slept == pauses


def test_progress_and_lines_are_process_0s(capsys, monkeypatch):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        show(f"line of {rank}")
        Progress().show(f"progress of {rank}")
    assert capsys.readouterr() == ("line of 0\n", "progress of 0\n")


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


def signalled(*numbers, **environment):
    """A process that is sent the signals, and prints after each which it has received."""
    argv = [sys.executable, "-c", SIGNALLED, *(str(int(number)) for number in numbers)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run(argv, capture_output=True, text=True, env=environment)


def test_stop_signals_are_noted_an_ignored_one_is_not_and_the_handlers_come_back():
    numbers = [signal.SIGHUP, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
    ended = signalled(*numbers)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [*map(int, ended.stdout.split())] == [0, *numbers[1:]]


def test_the_second_ctrl_c_ends_at_once():
    ended = signalled(signal.SIGINT, signal.SIGINT)
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == f"{int(signal.SIGINT)}\n"
    assert ended.stderr.startswith(STOPPING)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGXCPU])
def test_under_torchrun_only_the_signals_that_it_passes_on_are_noted(number):
    ended = signalled(signal.SIGTERM, number, TORCHELASTIC_RUN_ID="none")
    assert (ended.returncode, ended.stdout) == (-number, f"{int(signal.SIGTERM)}\n")


NOTEBOOK = """if True:
    import io, runpy, sys, threading

    class Stream:  # has no more than this
        def __init__(self):
            self.text = ""
        def write(self, text):
            self.text += text
        def flush(self):
            pass

    class Unreal(Stream):
        def fileno(self):
            raise io.UnsupportedOperation("fileno")

    shell, sys.argv = (sys.stdout, sys.stderr), sys.argv[1:]
    sys.stdout, sys.stderr = streams = Stream(), Unreal()
    def main():
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            print("status", end.code or 0, file=shell[0])
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    sys.stdout, sys.stderr = shell
    print(*(stream.text for stream in streams))
"""


def test_the_programs_run_in_a_notebook(dataset):
    """Whose streams may be any object with write and flush, and whose cells may run in any thread."""
    runs = ("prepare.py",), ("train.py", *tiny(max_iters=2)), ("sample.py",), ("sample.py", "--top_k=0")
    for program, *arguments in runs:
        argv = [sys.executable, "-c", NOTEBOOK, str(REPOSITORY / program), *arguments]
        ended = subprocess.run(argv, capture_output=True, text=True)
        assert ended.stderr == ""
        assert ended.stdout.startswith("status 2" if "--top_k=0" in arguments else "status 0"), ended.stdout


def test_every_recipe_is_read_and_writes_to_a_folder_of_its_own(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    recipes = [path for path in sorted(Path("config").rglob("*.py")) if path.name != "__init__.py"]
    assert len(recipes) >= 4
    for path in recipes:
        config = read(TrainConfig, [str(path)])
        name = path.relative_to("config").with_suffix("").as_posix()
        assert config.out_dir == ("out" if name == "shakespeare_char" else f"out/{name}")
        assert path.read_text().startswith("# ")
        assert config.micro_batch_size(2) >= 1


def test_each_rung_of_the_lecture_adds_its_idea_to_the_last(monkeypatch):
    monkeypatch.chdir(REPOSITORY / "config" / "lecture")
    rungs = [dataclasses.asdict(read(TrainConfig, [str(path)])) for path in sorted(Path().glob("*.py"))]
    added = [{name: new[name] for name in new if new[name] != old[name]} for old, new in itertools.pairwise(rungs)]
    for step in added:
        del step["out_dir"]
    one_head = {"n_layer": 1, "n_head": 1, "n_embd": 32, "feed_forward": False, "residual": False, "layer_norm": False}
    assert added[0] == {"model": "gpt", "learning_rate": 1e-2, **one_head}
    assert added[1] == {"n_head": 4}
    assert added[2] == {"feed_forward": True}
    assert added[3] == {"n_layer": 3, "residual": True, "learning_rate": 5e-3}
    assert added[4] == {"layer_norm": True}
    assert (rungs[6]["n_layer"], rungs[6]["n_head"], rungs[6]["n_embd"]) == (6, 6, 384)
    assert (rungs[6]["batch_size"], rungs[6]["block_size"], rungs[6]["dropout"]) == (64, 256, 0.2)
    assert {(rung["batch_size"], rung["block_size"]) for rung in rungs[:6]} == {(32, 8)}
    assert {rung["max_iters"] for rung in rungs} == {5000}


@pytest.mark.parametrize("world_size", [1, 2, 8, 16, 32])
def test_gpt2_124m_divides_among_powers_of_two(monkeypatch, world_size):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config = read(TrainConfig, ["config/gpt2_124m.py"])
    assert config.micro_batch_size(world_size) == 16
    assert config.batch_size * config.block_size == 2**19  # tokens a step
    assert config.batch_size * config.block_size * config.max_iters == pytest.approx(10e9, rel=1e-4)
    assert config.batch_size * config.block_size * config.eval_iters == 10_485_760  # what the field evaluates


def test_the_reference_recipe_equals_the_defaults(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert read(TrainConfig, ["config/shakespeare_char.py"]) == TrainConfig()


def test_only_tuned_values_of_a_recipe_may_follow_the_defaults(monkeypatch):
    """What else the defaults decided when they were AdamW's, for 5000 steps of 64 sequences, each recipe names."""
    monkeypatch.chdir(REPOSITORY)
    was = {"optimizer": "adamw", "batch_size": 64, "dropout": 0.2, "learning_rate": 1e-3, "min_lr": 1e-4}
    was |= {"warmup_iters": 100, "max_iters": 5000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "grad_clip": 1.0}
    lecture = {"batch_size": 32, "dropout": 0.0, "learning_rate": 0.05, "min_lr": 0.0, "weight_decay": 0.03}
    named = {
        "shakespeare_char_nanogpt": {},
        "stdlib_char": {
            "batch_size": 48, "dropout": 0.0, "learning_rate": 5e-3, "min_lr": 0.0, "max_iters": 1750
        },
        "finetune_gpt2": {
            "batch_size": 32, "dropout": 0.1, "learning_rate": 1e-4, "min_lr": 0.0, "warmup_iters": 5, "max_iters": 50
        },
        "gpt2_124m": {
            "optimizer": "muon", "batch_size": 512, "dropout": 0.0, "learning_rate": 1.8e-3, "min_lr": 0.0,
            "warmup_iters": 700, "max_iters": 19_073, "beta2": 0.95
        },
        "lecture/1_bigram": lecture,
        "lecture/2_self_attention": lecture | {"learning_rate": 1e-2},
        "lecture/3_multi_head": lecture | {"learning_rate": 1e-2},
        "lecture/4_feed_forward": lecture | {"learning_rate": 1e-2},
        "lecture/5_residual": lecture | {"learning_rate": 5e-3},
        "lecture/6_layer_norm": lecture | {"learning_rate": 5e-3},
        "lecture/7_scaled_up": lecture | {"batch_size": 64, "dropout": 0.2, "learning_rate": 3e-4},
    }  # fmt: skip
    for name, changes in named.items():
        found = dataclasses.asdict(read(TrainConfig, [f"config/{name}.py"]))
        assert {key: found[key] for key in was} == was | changes, name
