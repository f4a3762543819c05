"""Whatever ends a run, the same command goes on as if nothing had happened."""

import fcntl
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    REPOSITORY,
    STOPPING,
    checkpoint,
    command,
    free_port,
    losses,
    rows,
    same,
    signal_in_step,
    tiny,
    train_here,
    without_progress,
)

import prepare
import sample
import train
from config import UserError
from model import open_model

KILLS = int(os.environ.get("KILLS", 3))  # KILLS=50 python -m pytest -k killed: the long version, by hand


@contextmanager
def started(argv, **environment):
    """A running process, which does not outlive the block."""
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            yield running
        finally:
            running.kill()


def start(*arguments, program=(str(REPOSITORY / "train.py"),), **environment):
    return started([sys.executable, *program, *arguments], PYTHONPATH=REPOSITORY, **environment)


def wait_for(running, text):
    """Read the output up to a line with `text`; returns what was read."""
    read = ""
    for line in running.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"no {text!r} in {read}{running.stderr.read()}")


def wait_for_step(running, step):
    """Wait until out/log.csv has a row of this step or a later one."""
    while running.poll() is None:
        with suppress(OSError, ValueError, IndexError):
            if int(rows()[-1]["step"]) >= step:
                return
        time.sleep(0.02)
    raise AssertionError(running.stderr.read())


def assert_same_end(one, other):
    """Two runs ended with the same bits: weights, optimizer, best checkpoint and, but for the clock, log."""
    for name in ("model", "optimizer", "step", "best_val_loss"):
        assert same(checkpoint(f"{one}/ckpt.pt")[name], checkpoint(f"{other}/ckpt.pt")[name]), name
    assert same(checkpoint(f"{one}/best.pt")["model"], checkpoint(f"{other}/best.pt")["model"])
    timing = {"seconds": None, "tokens_per_second": None}
    assert [row | timing for row in rows(f"{one}/log.csv")] == [row | timing for row in rows(f"{other}/log.csv")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_killed_at_random_moments_ends_like_the_one_left_alone(dataset, dtype):
    settings = tiny(max_iters=50 * KILLS, eval_interval=5, log_interval=5, dtype=dtype)
    train.main([*settings, "--out_dir=whole"])
    chance, half_written = random.Random(0), Path("out/ckpt.pt.tmp")
    for kill in range(KILLS):
        half_written.unlink(missing_ok=True)
        with start(*settings) as running:
            for _ in range(chance.randrange(6, 14)):  # lines, each within a step, evaluation or checkpoint of the last
                running.stdout.readline()
            while kill % 2 and not half_written.exists():  # every second time amid a checkpoint
                assert running.poll() is None
            running.kill()
        assert running.returncode == -signal.SIGKILL
    assert 0 < checkpoint()["step"] < 50 * KILLS
    train.main(settings)
    assert_same_end("out", "whole")


def test_what_a_killed_write_leaves_behind_disturbs_nobody(dataset):
    train_here(max_iters=10)
    Path("out/ckpt.pt.tmp").write_bytes(b"half a checkpoint")
    train_here(max_iters=20)
    assert checkpoint()["step"] == 20
    assert not Path("out/ckpt.pt.tmp").exists()


# Asked to stop


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(dataset, number, status):
    settings = tiny(max_iters=300, eval_interval=150, log_interval=7)
    with start(*settings) as running:
        wait_for_step(running, 21)
        running.send_signal(number)
        out, errors = running.communicate(timeout=60)
    assert (running.returncode, without_progress(errors)) == (status, STOPPING if number == signal.SIGINT else "")
    said = re.search(rf"^stopped by {number.name} after step (\d+); the same command resumes\n\Z", out, re.M)
    assert 21 <= int(said[1]) == checkpoint()["step"] < 150
    train.main(settings)
    train.main([*settings, "--out_dir=whole"])
    assert_same_end("out", "whole")


def test_a_closed_terminal_leaves_a_checkpoint_before_anything_is_printed(dataset):
    """The terminal's end of a pseudo-terminal is closed: the run gets SIGHUP, and every print fails."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, str(REPOSITORY / "train.py"), *tiny(max_iters=10**6, eval_interval=10**6, log_interval=7)]
    session = {"preexec_fn": lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0), "start_new_session": True}
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, **session) as running:
        os.close(theirs)
        wait_for_step(running, 21)
        os.close(ours)
        assert running.wait(60) == 129
    assert checkpoint()["step"] >= 21


def test_a_closing_terminal_may_send_its_signal_twice():
    with train.StopSignals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == signal.SIGHUP


def test_a_run_under_nohup_ignores_a_closed_terminal(dataset):
    with start(*tiny(max_iters=150), program=("-c", NOHUP)) as running:
        wait_for_step(running, 5)
        running.send_signal(signal.SIGHUP)
        running.communicate(timeout=60)
    assert (running.returncode, checkpoint()["step"]) == (0, 150)


NOHUP = """if True:
    import signal, train
    from config import run
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run(train.main)
"""


def test_a_second_ctrl_c_ends_the_run_at_once():
    with train.StopSignals() as signals:
        assert not signals.received
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("failing", [False, True])
def test_after_a_run_signals_mean_what_they_meant_before(dataset, monkeypatch, request, failing):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    own = {number: lambda *_: None for number in numbers}
    for number in numbers:
        request.addfinalizer(partial(signal.signal, number, signal.signal(number, own[number])))

    def handlers():
        return {number: signal.getsignal(number) for number in numbers}

    def step(*given, original=train.train_step):
        assert not handlers().items() & own.items()
        return 1 / 0 if failing else original(*given)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(ZeroDivisionError) if failing else nullcontext():
        train_here(max_iters=1)
    assert handlers() == own


class KillError(Exception):
    """Stands for SIGKILL: nothing after it is done."""


@pytest.mark.parametrize("moment", ["train_step", "mean_loss"])
def test_after_a_signal_nothing_is_said_before_the_checkpoint(dataset, monkeypatch, moment):
    """SIGKILL may follow, and a terminal that is closed or full may block."""
    done, calls = [], []
    monkeypatch.setattr(train, "show", lambda text: done.append("show"))
    monkeypatch.setattr(train.State, "save", lambda *given, f=train.State.save: done.append("save") or f(*given))

    def signalled(*given, original=getattr(train, moment), **keys):  # noqa: B008
        calls.append(moment)
        if len(calls) == 4:  # the fourth step; in the evaluation of step 10, the second of its two splits
            os.kill(os.getpid(), signal.SIGTERM)
            done.clear()
        return original(*given, **keys)

    monkeypatch.setattr(train, moment, signalled)
    assert train.main(tiny()) == 143
    assert done[0] == "save"
    assert "show" in done


def train_until(owner, name, where=lambda *_: True, after=False, **settings):
    """A run that ends in a call of `owner.name` whose arguments are such, or right after it."""
    original = getattr(owner, name)

    def cut(*arguments, **keys):
        if after or not where(*arguments):
            result = original(*arguments, **keys)
        if where(*arguments):
            raise KillError
        return result

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(owner, name, cut)
        with pytest.raises(KillError):
            train_here(**settings)


def test_a_signal_before_an_evaluation_leaves_its_checkpoint_first(dataset, monkeypatch):
    """The evaluation may take longer than who has sent the signal waits: the resumed run does it."""
    evaluated = []
    with monkeypatch.context() as stopped:
        signal_in_step(stopped, signal.SIGTERM, last=9)
        stopped.setattr(train, "evaluate", lambda s, *rest, f=train.evaluate: evaluated.append(s.step) or f(s, *rest))
        assert train.main(tiny()) == 143
    assert (evaluated, checkpoint()["step"]) == ([0], 10)
    train_here()
    train_here(out_dir="whole")
    assert_same_end("out", "whole")


def test_a_run_stopped_before_an_evaluation_and_killed_in_it_misses_neither_row_nor_best_model(dataset, monkeypatch):
    """Wild on purpose: the loss is the lowest at step 10, and a run that forgets it keeps a worse model."""
    wild = {"learning_rate": 1.0, "min_lr": 0, "weight_decay": 0, "warmup_iters": 20}
    with monkeypatch.context() as stopped:
        signal_in_step(stopped, signal.SIGINT, last=9)
        assert train.main(tiny(**wild)) == 130
    for moment in (
        {"owner": train, "name": "mean_loss"},
        {"owner": train.State, "name": "save", "where": lambda state, name, *_: name == "best.pt", "after": True},
        {"owner": train.Log, "name": "write"},
        {"owner": train.Log, "name": "write", "after": True},
    ):
        train_until(**moment, **wild)
        assert checkpoint()["step"] == 10
    train_here(**wild)
    train_here(**wild, out_dir="whole")
    assert_same_end("out", "whole")
    assert checkpoint("out/best.pt")["step"] == checkpoint()["best_step"] == 10
    for name in ("loss", "val_loss"):
        assert [row["step"] for row in rows() if row[name] and row["step"] in ("10", "20")] == ["10", "20"]


def test_a_kill_in_an_evaluation_loses_no_step(dataset):
    """Who sends SIGTERM sends SIGKILL soon, and an evaluation may take longer."""
    train_until(train, "evaluate", lambda state, *_: state.step == 10)
    assert checkpoint()["step"] == 10
    assert rows()[-1]["step"] == "10" and rows()[-1]["loss"]
    train_here()
    train_here(out_dir="whole")
    assert_same_end("out", "whole")
    assert [row["step"] for row in rows() if row["loss"]] == ["1", "5", "10", "15", "20"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_an_evaluation_ends_the_run_after_one_more_step(dataset, monkeypatch, number):
    def signalled(state, *rest, original=train.evaluate):
        if state.step == 10:
            os.kill(os.getpid(), number)
        return original(state, *rest)

    with monkeypatch.context() as stopped:
        stopped.setattr(train, "evaluate", signalled)
        assert train.main(tiny()) == 128 + number
    assert checkpoint()["step"] == 11
    assert (rows()[-1]["step"], bool(rows()[-1]["val_loss"])) == ("10", True)
    train_here()
    train_here(out_dir="whole")
    assert_same_end("out", "whole")


@pytest.mark.parametrize("moment", ["State.save", "Log.write", "evaluate"])
def test_a_run_from_scratch_leaves_nothing_of_another_run_wherever_it_is_killed(dataset, monkeypatch, moment, capsys):
    """From its first checkpoint on, that is; before it, the other run is whole."""
    (dataset.parent / "other").mkdir()
    (dataset.parent / "other" / "input.txt").write_text("abc" * 5000)
    train_here()
    before = {path.name: path.read_bytes() for path in Path("out").glob("*.*")}
    owner = {"State.save": train.State, "Log.write": train.Log, "evaluate": train}[moment]
    train_until(owner, moment.split(".")[-1], dataset="other", init_from="scratch")
    if moment == "State.save":
        assert {path.name: path.read_bytes() for path in Path("out").glob("*.*")} == before
        return
    assert not Path("out/best.pt").exists()
    assert (checkpoint()["step"], checkpoint()["config"]["dataset"]) == (0, "other")
    with monkeypatch.context() as stopped:
        signal_in_step(stopped, signal.SIGTERM, last=4)
        assert train.main(tiny(dataset="other")) == 143
    assert [row["step"] for row in rows()] == ["0", "1", "5"]
    capsys.readouterr()
    sample.main(["--max_new_tokens=30"])
    captured = capsys.readouterr()
    assert captured.err == "out/ckpt.pt, step 5, on cpu, float32\n"
    assert set(captured.out) <= set("abc\n")


def test_out_of_memory_in_a_run_from_scratch_leaves_the_other_run_or_its_own(dataset):
    train_here()
    before = rows()
    for name, step in (("start", 20), ("evaluate", 0)):
        train_until(train, name, init_from="scratch")
        assert (checkpoint()["step"], rows()) == (step, before)
    train_here(max_iters=5)
    assert [row["step"] for row in rows()] == ["0", "1", "5", "5"]


MOMENTS = ((os, "replace"), (Path, "unlink"), (train, "train_step"), (train, "mean_loss"), (train.Log, "write"),
           (train.Log, "show_evaluation"))  # fmt: skip


def run_until(moment, **settings):
    """A run that is killed before the call of that number among MOMENTS; returns how many there were."""
    calls = 0

    def counted(original, *arguments, **keys):
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KillError
        return original(*arguments, **keys)

    with pytest.MonkeyPatch.context() as monkeypatch, suppress(KillError):
        for owner, name in MOMENTS:
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *given, f=original, **keys: counted(f, *given, **keys))
        train_here(**settings)
    return calls


@pytest.mark.parametrize("older", [False, True])
def test_a_run_killed_at_any_moment_ends_like_the_one_left_alone(dataset, older):
    """Before and after each step, evaluation and file, from scratch over an older run, too.

    Wild on purpose: the loss is the lowest before the end, and a run that forgets it keeps a worse model.
    """
    settings = {"max_iters": 4, "eval_interval": 2, "eval_iters": 1, "log_interval": 2, "batch_size": 4, "n_layer": 1}
    settings |= {"learning_rate": 0.8, "min_lr": 0, "warmup_iters": 30, "lr_decay_iters": 40, "seed": 1}
    calls = run_until(None, **settings, out_dir="whole")
    assert checkpoint("whole/ckpt.pt")["best_step"] == 2
    if older:
        train_here(**settings | {"seed": 2, "max_iters": 5}, out_dir="older")
    for moment in range(1, calls + 1):
        shutil.rmtree("out", ignore_errors=True)
        scratch = {}
        if older:
            shutil.copytree("older", "out")
            scratch = {"init_from": "scratch"}
        run_until(moment, **settings, **scratch)
        if older and checkpoint()["config"]["seed"] == 2:  # nothing of it is touched before ckpt.pt is replaced
            for name in ("ckpt.pt", "best.pt", "log.csv"):
                assert Path(f"out/{name}").read_bytes() == Path(f"older/{name}").read_bytes()
        else:
            scratch = {}
        train_here(**settings, **scratch)
        assert_same_end("out", "whole")


def assert_best_is_what_it_says():
    """The weights of best.pt have the loss, and are of the step, that ckpt.pt knows."""
    known, best = checkpoint(), checkpoint("out/best.pt")
    config = train.TrainConfig(**known["config"])
    process = train.Process(0, 1, torch.device("cpu"), torch.float32)
    tokens = train.Tokens(config.dataset, "val", prepare.load_meta(config.dataset), config.block_size)
    n_tokens = config.eval_iters * config.batch_size * config.block_size or len(tokens)
    loss = train.mean_loss(open_model("out/best.pt")[0], tokens, n_tokens, config, process)
    assert (best["step"], pytest.approx(loss, abs=1e-6)) == (known["best_step"], known["best_val_loss"])


@pytest.mark.parametrize("eval_iters", [0, 4])
def test_a_best_model_of_a_future_that_was_given_up_is_not_overwritten_by_a_worse_one(dataset, eval_iters):
    """An older ckpt.pt, restored from a backup, beside a newer best.pt; and the run is now evaluated otherwise.

    Or as before: then the best model is that of the backup's step again, as ckpt.pt says, not that of the future.
    """
    train_here(max_iters=10, lr_decay_iters=20)
    backup = Path("out/ckpt.pt").read_bytes()
    train_here()
    assert checkpoint("out/best.pt")["step"] == 20
    Path("out/ckpt.pt").write_bytes(backup)
    train_here(eval_iters=eval_iters, learning_rate=3.0)
    assert_best_is_what_it_says()


def test_a_run_from_scratch_that_cannot_begin_leaves_the_other_run(dataset, monkeypatch):
    train_here()
    before = {path.name: path.read_bytes() for path in Path("out").glob("*.*")}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError):
        train_here(init_from="scratch", tensorboard=True)
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.*")} == before


def test_a_run_from_scratch_that_is_stopped_says_how_to_go_on(dataset, capsys, monkeypatch):
    monkeypatch.setattr(train.StopSignals, "received", signal.SIGTERM)
    assert train.main(tiny(init_from="scratch")) == 143
    assert "; the same command without --init_from resumes\n" in capsys.readouterr().out
    for resumed in (tiny(), tiny(init_from="auto")):
        assert train.main(resumed) == 143
        assert "; the same command resumes\n" in capsys.readouterr().out


def test_a_signal_in_the_last_evaluation_comes_too_late_to_stop_the_run(dataset, monkeypatch, capsys):
    def signalled(state, *rest, original=train.evaluate):
        if state.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(state, *rest)

    monkeypatch.setattr(train, "evaluate", signalled)
    assert train.main(tiny()) is None
    assert "stopped by" not in (out := capsys.readouterr().out)
    assert "best validation loss" in out
    assert checkpoint()["step"] == 20


def test_a_run_whose_weights_are_not_finite_is_not_saved_when_it_is_stopped(dataset, monkeypatch):
    def poisoned(model, state, *rest, original=train.train_step):
        if state.step == 3:  # between two looks at the figures
            torch.nn.init.constant_(state.model.lm_head.weight, torch.nan)
            monkeypatch.setattr(train.StopSignals, "received", signal.SIGTERM)
        return original(model, state, *rest)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(UserError, match="weights are not finite at step 4"):
        train_here(log_interval=1000)
    assert checkpoint()["step"] == 0


# Several processes


@contextmanager
def start_two(*settings, **program):
    """Two processes that find each other, as torchrun would start them, but each in our own hands."""
    together = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with ExitStack() as both:
        yield [
            both.enter_context(start(*settings, RANK=rank, LOCAL_RANK=rank, **together, **program)) for rank in range(2)
        ]


def test_a_signal_to_one_process_ends_all_of_them_at_the_same_step(dataset):
    settings = tiny(max_iters=10**6, eval_interval=10**6, log_interval=7)
    with start_two(*settings) as (first, second):
        wait_for_step(first, 21)
        second.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=60)
        assert second.wait(60) == first.returncode == 143
    assert f"stopped by SIGTERM after step {checkpoint()['step']}; the same" in out


def test_when_one_process_is_killed_the_other_ends_with_one_line(dataset):
    with start_two(*tiny(max_iters=10**6, eval_interval=10**6, log_interval=7)) as (first, second):
        wait_for_step(first, 21)
        second.kill()
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("train.py")] == [
        "train.py, process 0: another process of this run has exited; --init_from=auto resumes from the last checkpoint"
    ]
    assert "Traceback" not in errors


def test_what_process_0_fails_with_while_the_other_waits_it_says_itself(folder):
    with start_two(*tiny(dataset="nothing")) as (first, second):
        errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (2, 1)
    assert re.fullmatch("train.py, process 0: there is no data/nothing/input.txt: .*\n", errors[0])
    assert re.search("^train.py, process 1: another process of this run has exited; ", errors[1], re.M)
    assert "Traceback" not in errors[1]


def test_an_error_of_one_process_is_said_by_it_and_ends_all(dataset):
    """Process 1 reads a token that is not in the vocabulary; process 0 does not."""
    code = """if True:
        import os, sys, numpy as np, train
        from config import run
        if os.environ["RANK"] == "1":
            original = np.memmap
            np.memmap = lambda *arguments: original(*arguments) | 4096
        run(train.main)
    """
    with start_two(*tiny(max_iters=10**6), program=["-c", code]) as (first, second):
        errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert first.returncode == second.returncode == 1
    assert re.search(
        r"^-c, process 1: data/shakespeare_char/\w+.bin has token id \d+; the vocabulary has", errors[1], re.M
    )
    assert "-c, process 0: another process of this run has exited; --init_from=auto resumes" in errors[0]
    assert "Traceback" not in "".join(errors)


def test_one_process_that_is_out_of_memory_says_so_with_its_rank(dataset):
    code = """if True:
        import os, train
        from config import run
        if os.environ["RANK"] == "1":
            def step(*_):
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            train.train_step = step
        run(train.main)
    """
    with start_two(*tiny(max_iters=10**6), program=["-c", code]) as (first, second):
        errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert first.returncode == second.returncode == 1
    assert "-c, process 1: out of memory; try a smaller batch, model or context\n" in errors[1]
    assert "-c, process 0: another process of this run has exited; --init_from=auto resumes" in errors[0]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find torchrun's processes")
def test_torchrun_starts_again_what_lost_a_process(dataset, capsys):
    settings = {"max_iters": 240, "eval_interval": 20, "log_interval": 20, "dropout": 0.0}
    train_here(**settings, out_dir="whole")
    alone = losses(capsys.readouterr().out)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--max_restarts=3"]
    argv += ["--nproc_per_node=2", str(REPOSITORY / "train.py"), *tiny(**settings)]
    with started(argv, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1) as running:
        read = ""
        for step in (60, 140):  # not just once: torchrun's store remembers every start
            read += wait_for(running, f"step {step}: train loss")
            os.kill(children(running.pid)[-1], signal.SIGKILL)
        out, errors = running.communicate(timeout=120)
    assert running.returncode == 0, errors
    resumed = re.findall(r"resuming from out/ckpt.pt at step (\d+)", read + out)
    assert [int(step) >= killed for step, killed in zip(resumed, (60, 140), strict=True)] == [True, True]
    for step, pair in losses(read + out).items():
        assert pair == pytest.approx(alone[step], abs=1e-3)
    assert checkpoint()["step"] == 240


def test_after_a_failure_scratch_resumes_the_run(dataset, monkeypatch, capsys):
    """torchrun repeats the command, which must not begin again what it has begun."""
    train_here(max_iters=10, init_from="scratch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_here(init_from="scratch")
    assert "resuming from out/ckpt.pt at step 10" in capsys.readouterr().out
    assert checkpoint()["step"] == 20


def test_two_machines_learn_what_one_process_learns(dataset, capsys):
    """Two hosts, each with a network of its own, joined by a virtual cable."""
    settings = {"max_iters": 20, "dropout": 0.0}
    train_here(**settings, out_dir="one")
    alone = losses(capsys.readouterr().out)
    hosts = [f"gpt{os.getpid()}{end}" for end in "ab"]
    running = []
    with ExitStack() as both:
        for host in hosts:
            if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", host], capture_output=True).returncode:
                pytest.skip("needs the right to make network namespaces")
            both.callback(subprocess.run, ["ip", "netns", "del", host])
        first, second = hosts
        cable = f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}"
        subprocess.run(cable.split(), check=True)
        for host, address in zip(hosts, ("10.99.0.1", "10.99.0.2"), strict=True):
            for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", host, *words.split()], check=True)
        for rank, host in enumerate(hosts):
            argv = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            argv += [f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=10.99.0.1", "--master_port=29500"]
            argv += [str(REPOSITORY / "train.py"), *tiny(**settings)]
            running.append(both.enter_context(started(argv, GLOO_SOCKET_IFNAME="eth0")))
        out = "".join(process.communicate(timeout=120)[0] for process in running)
        assert [process.returncode for process in running] == [0, 0]
    assert len(out.splitlines()) == len({*out.splitlines()})  # one of them speaks
    together = losses(out)
    assert together.keys() == alone.keys() == {0, 10, 20}
    for step in alone:
        assert together[step] == pytest.approx(alone[step], abs=3e-4)


# Disks


@pytest.fixture
def small_disk(folder):
    """A file system of 4 MB at out/."""
    Path("out").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", "out"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield Path("out")
    subprocess.run(["umount", "out"], check=True)


def test_on_a_full_disk_the_old_checkpoint_stays_and_with_space_the_run_goes_on(dataset, small_disk):
    settings = {"n_embd": 64, "block_size": 32}
    train_here(**settings, out_dir="whole")
    train_here(**settings, max_iters=10, lr_decay_iters=20)
    rest = small_disk / "something else"
    subprocess.run(["dd", "if=/dev/zero", f"of={rest}"], capture_output=True)  # until nothing is free
    os.truncate(rest, rest.stat().st_size - 2**18)  # enough for the log
    before = [Path("out/ckpt.pt").read_bytes(), Path("out/best.pt").read_bytes()]
    ended = command("train.py", *tiny(**settings, lr_decay_iters=20))
    assert ended.returncode == 1
    assert without_progress(ended.stderr) == "train.py: [Errno 28] No space left on device: 'out/ckpt.pt'\n"
    assert [Path("out/ckpt.pt").read_bytes(), Path("out/best.pt").read_bytes()] == before
    assert sorted(os.listdir("out")) == ["best.pt", "ckpt.pt", "lock", "log.csv", rest.name]
    rest.unlink()
    train_here(**settings, lr_decay_iters=20)
    assert_same_end("out", "whole")


def test_on_a_read_only_disk_nothing_is_lost_either(dataset, small_disk):
    train_here(max_iters=10)
    subprocess.run(["mount", "-o", "remount,ro", "out"], check=True)
    with pytest.raises(OSError, match=r"Read-only file system: 'out/"):
        train_here(max_iters=20)
    subprocess.run(["mount", "-o", "remount,rw", "out"], check=True)
    train_here(max_iters=20)
    assert checkpoint()["step"] == 20


def test_a_folder_that_vanishes_is_one_line_and_status_1(dataset):
    with start(*tiny(max_iters=10**6, eval_interval=10**6)) as running:
        wait_for_step(running, 10)
        os.rename("out", "gone")
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    assert without_progress(errors) == "train.py: [Errno 2] No such file or directory: 'out/log.csv'\n"


# Two runs


@pytest.mark.parametrize("program", ["prepare.py", "train.py"])
def test_two_at_once_on_one_dataset_both_end_well_and_the_files_are_right(folder, program):
    folder = Path("data/shakespeare_char")
    folder.mkdir(parents=True)
    (folder / "input.txt").write_text("To be, or not to be. " * 20_000)
    settings = [] if program == "prepare.py" else tiny(max_iters=1)
    with ExitStack() as both:
        running = [
            both.enter_context(start(*settings, *own, program=(str(REPOSITORY / program),)))
            for own in ([], [] if program == "prepare.py" else ["--out_dir=other"])
        ]
        outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    prepared = "".join(out for out, _ in outputs).count("378,000 train tokens")
    assert prepared == (2 if program == "prepare.py" else 1)  # prepare.py is told to, train.py finds it ready
    (folder / "lock").unlink()
    assert sorted(os.listdir(folder)) == ["input.txt", "meta.json", "train.bin", "val.bin"]
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    prepare.main([])
    (folder / "lock").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def test_who_waits_for_a_dataset_says_so(folder):
    path = Path("data/shakespeare_char/input.txt")
    path.parent.mkdir(parents=True)
    path.write_text("To be, or not to be. " * 500)
    with ExitStack() as waiting:
        with prepare.locked(path.with_name("lock")):
            running = waiting.enter_context(start(program=(str(REPOSITORY / "prepare.py"),)))
            line = f"{path.parent} is in use by another run: waiting for it\n"
            assert running.stderr.readline() == line
        assert running.wait(60) == 0
    assert prepare.load_meta("shakespeare_char")["train_tokens"] == 9450


def test_who_waited_finds_the_dataset_ready_and_leaves_it_alone(dataset):
    meta = dataset / "meta.json"
    with ExitStack() as waiting:
        with prepare.locked(dataset / "lock"):
            meta.rename("aside.json")
            running = waiting.enter_context(start(*tiny(max_iters=1)))
            assert running.stderr.readline().endswith(": waiting for it\n")
            Path("aside.json").rename(meta)
        before = meta.stat().st_mtime_ns
        out, _ = running.communicate(timeout=60)
    assert (running.returncode, "train tokens" in out, meta.stat().st_mtime_ns) == (0, False, before)


def test_a_second_run_in_the_same_folder_is_refused(dataset):
    with start(*tiny(max_iters=10**6)) as running:
        wait_for(running, "step 10:")
        refusal = "out is in use by another run: let it end, or take another --out_dir"
        for settings in ({}, {"init_from": "scratch"}):
            with pytest.raises(UserError) as error:
                train_here(**settings)
            assert str(error.value) == refusal
        train_here(out_dir="another", max_iters=1)
        train_here(eval_only=True)
        running.kill()
    train_here(max_iters=checkpoint()["step"] + 1)  # the lock of the dead stops nobody


def test_the_lock_ends_with_the_run(dataset):
    train_here(max_iters=5)
    train_here(max_iters=10)
    with pytest.raises(UserError, match="holds another model"):
        train_here(n_layer=1)
    train_here(max_iters=15)
