"""Whatever ends a run, the same command goes on as if nothing had happened.

Killed at any moment, by SIGKILL too, a run ends in the same bits as the one left alone, with the same best.pt and the
same evaluations. A signal to stop ends it after its step, with a checkpoint and the exit status 128+N. So it is with
several processes. A full disk leaves the last checkpoint whole. Two runs do not write to one folder.
"""

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
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, checkpoint, free_port, rows, same, tiny, train_here

import prepare
import train
from config import UserError
from model import open_model

KILLS = int(os.environ.get("KILLS", 1))  # KILLS=50 python -m pytest -k killed: the long version, by hand


@contextmanager
def start(*arguments, **environment):
    """A running train.py, which does not outlive the block."""
    argv, environment = [sys.executable, str(REPOSITORY / "train.py"), *arguments], os.environ | environment
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for_step(running, step):
    """Wait until out/log.csv has a row of this step or a later one."""
    while running.poll() is None:
        with suppress(OSError, ValueError, IndexError):
            if int(rows()[-1]["step"]) >= step:
                return
        time.sleep(0.02)
    raise AssertionError(running.stderr.read())


@cache
def left_alone(**settings):
    """The folder of a run that nothing disturbs; every test has the same text."""
    folder = Path(f"whole{left_alone.cache_info().misses}").absolute()
    train_here(**settings, out_dir=folder)
    return folder


def assert_ends_like_the_run_left_alone(**settings):
    """The same command ends with the same bits: weights, optimizer, best checkpoint and, but for the clock, log."""
    train_here(**settings)
    whole = left_alone(**settings)
    for name in ("model", "optimizer", "step", "best_val_loss", "best_step"):
        assert same(checkpoint()[name], checkpoint(whole / "ckpt.pt")[name]), name
    assert same(checkpoint("out/best.pt")["model"], checkpoint(whole / "best.pt")["model"])
    timing = {"seconds": None, "tokens_per_second": None}
    assert [row | timing for row in rows()] == [row | timing for row in rows(whole / "log.csv")]
    assert sorted(os.listdir("out")) == sorted(os.listdir(whole))


# Killed


def test_a_run_killed_amid_a_checkpoint_ends_like_the_one_left_alone(dataset):
    """By the system, after a while at random."""
    settings = {"max_iters": 40 * KILLS, "eval_interval": 5, "log_interval": 5}
    chance, half_written = random.Random(0), Path("out/ckpt.pt.tmp")
    for _ in range(KILLS):
        half_written.unlink(missing_ok=True)
        with start(*tiny(**settings)) as running:
            for _ in range(chance.randrange(2, 6)):  # lines
                running.stdout.readline()
            while not half_written.exists():
                assert running.poll() is None
            running.kill()
        assert running.returncode == -signal.SIGKILL
    assert 0 < checkpoint()["step"] < 40 * KILLS
    assert_ends_like_the_run_left_alone(**settings)


class KillError(Exception):
    """Stands for SIGKILL: nothing after it is done."""


MOMENTS = ((os, "replace"), (Path, "unlink"), (train, "train_step"), (train, "mean_loss"), (train.Log, "write"),
           (train.Log, "show_evaluation"))  # fmt: skip


def run_until(moment, **settings):
    """A run that is killed before the call of that number among MOMENTS; returns the names of the calls."""
    calls = []

    def counted(name, original, *arguments, **keys):
        calls.append(name)
        if len(calls) == moment:
            raise KillError
        return original(*arguments, **keys)

    with pytest.MonkeyPatch.context() as monkeypatch, suppress(KillError):
        for owner, name in MOMENTS:
            counting = partial(counted, name, getattr(owner, name))
            monkeypatch.setattr(owner, name, lambda *given, f=counting, **keys: f(*given, **keys))
        train_here(**settings)
    return calls


def test_a_run_killed_at_any_moment_ends_like_the_one_left_alone(dataset):
    """Before and after each step, evaluation and file of a run from scratch over an older one; and then once more.

    Wild on purpose: the loss is the lowest before the end, and a run that forgets it keeps a worse model.
    """
    settings = {"max_iters": 4, "eval_interval": 2, "eval_iters": 1, "log_interval": 2, "batch_size": 4, "n_layer": 1}
    settings |= {"learning_rate": 0.8, "min_lr": 0, "warmup_iters": 30, "lr_decay_iters": 40, "seed": 1}
    assert checkpoint(left_alone(**settings) / "ckpt.pt")["best_step"] == 2
    older = left_alone(**settings | {"seed": 2, "max_iters": 5})
    moment, calls = 0, [None]
    while len(calls) >= moment:  # until none is left
        moment += 1
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree(older, "out")
        calls = run_until(moment, **settings, init_from="scratch")
        scratch = {}
        if checkpoint()["config"]["seed"] == 2:  # nothing of it is touched before ckpt.pt is replaced
            for name in ("ckpt.pt", "best.pt", "log.csv"):
                assert Path(f"out/{name}").read_bytes() == (older / name).read_bytes()
            scratch = {"init_from": "scratch"}
        elif calls[-1] != "unlink":  # right after it
            assert not Path("out/best.pt").exists() or checkpoint("out/best.pt")["config"]["seed"] == 1
        Path("out/ckpt.pt.tmp").write_bytes(b"half a checkpoint")
        run_until(3, **settings, **scratch)
        assert_ends_like_the_run_left_alone(**settings)
    assert {name: calls.count(name) for name in ("replace", "train_step", "mean_loss", "write")} == {
        "replace": 6, "train_step": 4, "mean_loss": 6, "write": 6,
    }  # fmt: skip


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
    known, best = checkpoint(), checkpoint("out/best.pt")
    tokens = train.Tokens("shakespeare_char", "val", prepare.load_meta("shakespeare_char"), 16)
    process = train.Process(0, 1, torch.device("cpu"), torch.float32)
    n_tokens = eval_iters * 8 * 16 or len(tokens)
    config = train.TrainConfig(**known["config"])
    loss = train.mean_loss(open_model("out/best.pt")[0], tokens, n_tokens, config, process)
    assert (best["step"], pytest.approx(loss, abs=1e-6)) == (known["best_step"], known["best_val_loss"])


# Asked to stop


WILD = {"learning_rate": 1.0, "min_lr": 0, "weight_decay": 0, "warmup_iters": 20}  # the loss is the lowest at step 10
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


def stopped_run(request, monkeypatch, number, moment, count, **settings):
    """A run that gets the signal at the start of that call of `train.moment`: (its exit status, what it did then)."""
    calls, done = 0, []

    def noted(owner, name, what):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **keys: done.append(what(*given)) or original(*given, **keys))

    def signalled(*given, original=getattr(train, moment), **keys):  # noqa: B008
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
            done.clear()
        return original(*given, **keys)

    def before(*_):
        raise AssertionError("no run waited for the signal")

    request.addfinalizer(partial(signal.signal, number, signal.signal(number, before)))
    with monkeypatch.context() as monkeypatch:
        noted(train, "evaluate", lambda state, *_: f"evaluate {state.step}")
        noted(train.State, "save", lambda state, name, *_: f"{name} {state.step}")
        noted(train, "show", lambda text: "show")
        monkeypatch.setattr(train, moment, signalled)
        status = train.main(tiny(**settings))
    assert signal.getsignal(number) is before  # after a run, a signal means what it meant before
    return status, done


@pytest.mark.parametrize(
    ("number", "moment", "count", "step"),
    [(number, "train_step", 7, 7) for number in SIGNALS]
    + [(signal.SIGTERM, "train_step", 10, 10), (signal.SIGINT, "mean_loss", 4, 11)],
)
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(
    dataset, request, monkeypatch, capsys, number, moment, count, step
):
    """Before an evaluation, the resumed run does it; during one (the second split of step 10), it is a step later.

    The checkpoint comes before anything is said: SIGKILL may follow, and a terminal that is closed may block.
    """
    status, done = stopped_run(request, monkeypatch, number, moment, count, **WILD)
    assert status == 128 + number
    evaluated = ["best.pt 10", "ckpt.pt 10", "show"] if moment == "mean_loss" else []
    assert done == [*evaluated, f"ckpt.pt {step}", "show"]
    assert f"stopped by {number.name} after step {step}; the same command resumes\n" in capsys.readouterr().out
    assert checkpoint()["step"] == step
    assert_ends_like_the_run_left_alone(**WILD)
    assert checkpoint("out/best.pt")["step"] == 10


def test_a_kill_in_an_evaluation_loses_no_step(dataset, monkeypatch):
    """Who sends SIGTERM sends SIGKILL soon, and an evaluation may take longer."""
    saved = []
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *given: saved.append(checkpoint()["step"]) or evaluate(*given))
    train_here()
    assert saved == [0, 10, 20]


def test_a_signal_in_the_last_evaluation_comes_too_late_to_stop_the_run(dataset, request, monkeypatch, capsys):
    status, _ = stopped_run(request, monkeypatch, signal.SIGTERM, "evaluate", 3)
    assert status is None
    assert "stopped by" not in (out := capsys.readouterr().out)
    assert "best validation loss" in out


def test_a_run_from_scratch_that_is_stopped_says_how_to_go_on(dataset, capsys, monkeypatch):
    monkeypatch.setattr(train.StopSignals, "received", signal.SIGTERM)
    assert train.main(tiny(init_from="scratch")) == 143
    assert "; the same command without --init_from resumes\n" in capsys.readouterr().out
    assert train.main(tiny(init_from="auto")) == 143
    assert "; the same command resumes\n" in capsys.readouterr().out


def test_a_closed_terminal_leaves_a_checkpoint_before_anything_is_printed(dataset):
    """The terminal's end of a pseudo-terminal is closed: the run gets SIGHUP, and every print fails."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, str(REPOSITORY / "train.py"), *tiny(max_iters=10**6, eval_interval=10**6, log_interval=1)]
    session = {"preexec_fn": lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0), "start_new_session": True}
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, **session) as running:
        os.close(theirs)
        wait_for_step(running, 2)
        os.close(ours)
        assert running.wait(60) == 129
    assert checkpoint()["step"] >= 2


# Several processes


@contextmanager
def start_two(**settings):
    """Two processes that find each other, as torchrun would start them, but each in our own hands."""
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as both:
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        yield [both.enter_context(start(*tiny(**settings), **together, **rank)) for rank in ranks]


LOST = "another process of this run has exited; --init_from=auto resumes from the last checkpoint"


def test_when_one_process_is_killed_the_other_ends_with_one_line(dataset):
    with start_two(max_iters=10**6, log_interval=1) as (first, second):
        wait_for_step(first, 1)
        second.kill()
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("train.py")] == [f"train.py, process 0: {LOST}"]
    assert "Traceback" not in errors


def test_what_process_0_fails_with_while_the_other_waits_it_says_itself(folder):
    with start_two(dataset="nothing") as (first, second):
        errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (2, 1)
    assert re.fullmatch("train.py, process 0: there is no data/nothing/input.txt: .*\n", errors[0])
    assert f"train.py, process 1: {LOST}\n" in errors[1]
    assert "Traceback" not in errors[1]


def test_after_a_failure_scratch_resumes_the_run(dataset, monkeypatch, capsys):
    """torchrun repeats the command, which must not begin again what it has begun."""
    train_here(max_iters=10, init_from="scratch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_here(init_from="scratch")
    assert "resuming from out/ckpt.pt at step 10" in capsys.readouterr().out
    assert checkpoint()["step"] == 20


# Disks


def test_on_a_full_or_read_only_disk_the_old_files_stay_and_with_space_the_run_goes_on(dataset):
    """A file system of 4 MB at out/."""
    settings = {"n_embd": 64, "block_size": 32, "lr_decay_iters": 20}
    out = Path("out")
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", "out"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        train_here(**settings, max_iters=10)
        rest = out / "something else"
        subprocess.run(["dd", "if=/dev/zero", f"of={rest}"], capture_output=True)  # until nothing is free
        os.truncate(rest, rest.stat().st_size - 2**18)  # enough for the log
        before = [Path("out/ckpt.pt").read_bytes(), Path("out/best.pt").read_bytes()]
        for error in (r"^\[Errno 28\] No space left on device: 'out/ckpt.pt'$", r"Read-only file system: 'out/"):
            with pytest.raises(OSError, match=error):
                train_here(**settings)
            assert [Path("out/ckpt.pt").read_bytes(), Path("out/best.pt").read_bytes()] == before
            assert sorted(os.listdir("out")) == ["best.pt", "ckpt.pt", "lock", "log.csv", rest.name]
            subprocess.run(["mount", "-o", "remount,ro", "out"], check=True)
        subprocess.run(["mount", "-o", "remount,rw", "out"], check=True)
        rest.unlink()
        assert_ends_like_the_run_left_alone(**settings)
    finally:
        subprocess.run(["umount", "out"], check=True)


# Two runs


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(dataset, monkeypatch):
    def others(*given, original=train.train_step):
        monkeypatch.setattr(train, "train_step", original)
        for settings in ({}, {"init_from": "scratch"}):
            with pytest.raises(UserError, match=r"^out is in use by another run: .* another --out_dir$"):
                train_here(**settings)
        train_here(out_dir="another", max_iters=1)
        train_here(eval_only=True)
        return original(*given)

    monkeypatch.setattr(train, "train_step", others)
    train_here(max_iters=5)
    assert Path("another/ckpt.pt").exists()
    with pytest.raises(UserError, match="holds another model"):
        train_here(n_layer=1)
    train_here(max_iters=6)


@pytest.mark.parametrize("told", [True, False])
def test_who_waits_for_a_dataset_says_so_and_leaves_a_ready_one_alone_unless_told_to_prepare_it(
    dataset, capsys, monkeypatch, told
):
    """Threads here, but the lock is the files', so they might be processes: python prepare.py, or two trainings."""
    meta, expected = dataset / "meta.json", {file.name: file.read_bytes() for file in dataset.iterdir()}
    os.utime(meta, (1, 1))
    said = []
    monkeypatch.setattr(prepare, "print", lambda text, file: said.append(text), raising=False)
    work = (lambda: prepare.main([])) if told else (lambda: prepare.prepared("shakespeare_char"))
    others = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    with prepare.locked(dataset / "lock"):
        meta.rename("aside.json")
        for other in others:
            other.start()
        deadline = time.monotonic() + 30
        while len(said) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert said == ["data/shakespeare_char is in use by another run: waiting for it"] * 2
        Path("aside.json").rename(meta)
    for other in others:
        other.join(60)
    assert capsys.readouterr().out.count("18,000 train tokens") == (2 if told else 0)
    assert (meta.stat().st_mtime != 1) == told
    assert {file.name: file.read_bytes() for file in dataset.iterdir()} == expected
