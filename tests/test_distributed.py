"""One process and many train the same run: they see the same batches and evaluate the same tokens.

A signal to any of them ends all at one step. Process 0 prepares the data, writes the files and speaks. Machines whose
files or commands differ do not train together. Real processes, joined by gloo on loopback, but few: they start slowly.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, STOPPING, WORDS, checkpoint, free_port, rows, tiny, train_here

import prepare
import train
from config import UserError

# Started by torchrun


def torchrun(*arguments):
    """Run train.py in two processes; torchrun picks a free port."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    argv += ["--nproc_per_node=2", str(REPOSITORY / "train.py"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240)


def test_process_0_prepares_the_data_and_another_number_of_processes_goes_on_with_the_run(folder):
    path = folder / "data" / "shakespeare_char" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_text("To be, or not to be. " * 500)
    settings = {"dropout": 0.0, "log_interval": 1, "lr_decay_iters": 20}
    ended = torchrun(*tiny(**settings, max_iters=10))
    assert ended.returncode == 0, ended.stderr
    for said in ("9,450 train tokens", "step 0: train loss", "best validation loss"):
        assert ended.stdout.count(said) == 1
    assert not any(name.startswith("module.") for name in checkpoint()["model"])  # DistributedDataParallel's prefix
    for name in ("out", "whole"):
        train_here(**settings, max_iters=20, out_dir=name)
    assert logged("out", "loss") == pytest.approx(logged("whole", "loss"), abs=2e-4)


def test_a_mistake_of_all_processes_is_said_by_process_0(folder):
    """torchrun ends the others before they say it too, and adds its own report of the failure."""
    ended = torchrun(*tiny(gradient_accumulation_steps=3))
    assert ended.returncode != 0
    problem = "batch_size (8) must be divisible by the number of processes (2) x gradient_accumulation_steps (3)"
    assert ended.stderr.count(f"train.py, process 0: {problem}\n") == 1
    assert "process 1:" not in ended.stderr
    assert 'train.py", line' not in ended.stderr


# Of two machines, in this process


def test_the_others_wait_for_a_download_that_takes_longer_than_any_timeout(monkeypatch):
    calls, groups = [], iter(["fast", "slow"])
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **keys: next(groups))
    monkeypatch.setattr(train.dist, "new_group", lambda **keys: calls.append(keys["timeout"]) or next(groups))
    monkeypatch.setattr(train.dist, "barrier", calls.append)
    monkeypatch.setattr(train.dist, "all_gather_object", lambda found, own, group: calls.append(group))
    environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = train.join_processes(train.TrainConfig(device="cpu"))
    process.barrier()
    process.refuse_unequal({})
    assert calls[0] >= timedelta(days=1)
    assert calls[1:] == ["slow", "slow"]


def change_meta(**changes):
    path = Path("data/shakespeare_char/meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_token(split, place):
    ids = np.fromfile(f"data/shakespeare_char/{split}.bin", "<u2")
    ids[place] ^= 1
    ids.tofile(f"data/shakespeare_char/{split}.bin")


def change_weights():
    """Of another run with as many steps."""
    other = checkpoint()
    other["model"]["transformer.ln_f.weight"] += 0.5
    torch.save(other, "out/ckpt.pt")


@pytest.mark.parametrize(
    ("difference", "settings", "what"),
    [
        (lambda: change_meta(source="elsewhere"), {}, None),
        (lambda: change_meta(val_bytes=5), {}, "meta.json"),
        (lambda: change_token("train", 0), {}, "data/shakespeare_char/train.bin"),
        (lambda: change_token("val", -1), {}, "data/shakespeare_char/val.bin"),
        (lambda: train_here(max_iters=15), {}, "step, weights"),
        (lambda: change_weights(), {}, "weights"),
        (lambda: None, {"learning_rate": 2e-3}, "learning_rate"),
        (lambda: None, {"eval_only": True}, "eval_only"),
    ],
)
def test_machines_whose_files_or_commands_differ_do_not_train_together(
    dataset, monkeypatch, difference, settings, what
):
    """They would, with a loss that means nothing. Each machine's facts are gathered here, one after another."""
    machines, refuse = [], train.Process.refuse_unequal
    train_here(max_iters=10)
    for keys in ({}, settings):
        if machines:
            difference()
        with monkeypatch.context() as of_two:
            of_two.setattr(train, "join_processes", lambda _: train.Process(0, 2, torch.device("cpu"), torch.float32))
            of_two.setattr(train.dist, "barrier", lambda group: None)
            of_two.setattr(train.Process, "refuse_unequal", lambda self, own: machines.append(own))
            train.start(train.read(train.TrainConfig, tiny(**keys)))
    monkeypatch.setattr(train.dist, "all_gather_object", lambda found, *_: found.__setitem__(slice(None), machines))
    for rank, own in enumerate(machines):
        with pytest.raises(UserError, match=f"^not the same in every process: {what};") if what else nullcontext():
            refuse(train.Process(rank, 2, torch.device("cpu"), torch.float32), own)


def test_of_a_long_split_the_first_and_the_last_million_tokens_are_compared(folder):
    Path("data/long").mkdir(parents=True)
    found = set()
    for place in (0, 999_999, -1_000_000, -1):
        ids = np.zeros(2_000_002, "<u2")
        ids[place] = 1
        ids.tofile("data/long/train.bin")
        found.add(train.Tokens("long", "train", {"vocab_size": 2}, 8).fingerprint())
    assert len(found) == 4


# Runs of one to four processes, all in one start


ONE_OF_FOUR = """if True:
    import contextlib, io, json, os, signal, sys, time
    import torch
    import train
    from config import UserError

    clock, rank = [0.0], int(os.environ["RANK"])
    time.perf_counter = lambda: clock[0]  # what takes no second here takes no time

    def step(model, state, *rest, original=train.train_step):
        clock[0] += 1
        if name in ("SIGTERM", "SIGINT") and state.step == 4:
            os.kill(os.getpid(), getattr(signal, name))  # to every process, as Slurm and a terminal send it
        return original(model, state, *rest)

    def evaluate(state, *rest, original=train.evaluate):
        if name == "evaluating" and rank == 1 and state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # to one process, during an evaluation
        return original(state, *rest)

    def save(checkpoint, *rest, original=torch.save):
        if name == "SIGTERM" and checkpoint["step"]:
            time.sleep(1)  # a slow disk
        original(checkpoint, *rest)

    train.train_step, train.evaluate, torch.save, found = step, evaluate, save, {}
    for name, processes, port, argv in json.loads(sys.argv[1]):
        if rank < processes:
            os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
            if name == "unequal":
                argv.append(f"--seed={rank}")
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
                try:
                    status = train.main(argv)
                    on_disk = torch.load(f"{name}/ckpt.pt", weights_only=True)["step"]  # when this process is through
                except UserError as error:
                    status, on_disk = str(error), None
            found[name] = {"status": status, "out": out.getvalue(), "errors": errors.getvalue(), "step": on_disk}
            if processes > 1:
                torch.distributed.destroy_process_group()
    print(json.dumps(found))
"""
SHORT = {"dataset": "long", "batch_size": 24, "dropout": 0.0, "log_interval": 1, "eval_iters": 0, "eval_interval": 100}
MUON = {"max_iters": 4, "eval_iters": 1, "optimizer": "muon"}
RUNS = {  # name: (processes, settings); who has nothing to do in a run waits for the next, so the large ones come first
    "4": (4, {"max_iters": 1}),
    "3": (3, {"max_iters": 1}),
    "2": (2, {"max_iters": 4}),
    "2, part": (2, {"max_iters": 1, "eval_iters": 5}),
    "2 x 3, part": (2, {"max_iters": 4, "gradient_accumulation_steps": 3, "eval_iters": 5}),
    "2, muon": (2, MUON),
    "SIGTERM": (2, {"max_iters": 100, "eval_iters": 1}),
    "SIGINT": (2, {"max_iters": 100, "eval_iters": 1}),
    "evaluating": (2, {"max_iters": 100, "eval_iters": 1, "eval_interval": 2}),
    "unequal": (2, {"max_iters": 1, "eval_iters": 1}),
    "1": (1, {"max_iters": 4}),
    "1, part": (1, {"max_iters": 1, "eval_iters": 5}),
    "1 x 4, part": (1, {"max_iters": 4, "gradient_accumulation_steps": 4, "eval_iters": 5}),
    "1, muon": (1, MUON),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four processes saw of each run; the current folder holds the runs' own."""
    with pytest.MonkeyPatch.context() as monkeypatch, ExitStack() as all_of_them:
        monkeypatch.chdir(tmp_path_factory.mktemp("together"))
        text = " ".join(np.random.default_rng(0).choice(WORDS, size=30_000))[:100_000]
        Path("long.txt").write_text(text)
        prepare.main(["--dataset=long", "--input=long.txt", "--val_fraction=0.5"])
        runs = [(name, n, free_port(), tiny(**SHORT | own, out_dir=name)) for name, (n, own) in RUNS.items()]
        argv = [sys.executable, "-c", ONE_OF_FOUR, json.dumps(runs)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1"}
        pipes, started = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}, []
        for rank in range(4):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(all_of_them.enter_context(subprocess.Popen(argv, env=environment | own, **pipes)))
            all_of_them.callback(started[-1].kill)
        ends = [process.communicate(timeout=240) for process in started]
        assert [process.returncode for process in started] == [0] * 4, ends
        yield [json.loads(out[out.index("{") :]) for out, _ in ends]  # before it, torch 2.8's gloo tells of itself


def logged(run, name):
    """The column `name` of the run's log.csv, without empty cells."""
    return [float(row[name]) for row in rows(f"{run}/log.csv") if row[name]]


@pytest.mark.parametrize("processes", ["2", "3", "4"])
def test_an_evaluation_is_the_same_however_many_processes_share_it(found, processes):
    """Of 50,000 tokens each: six groups of blocks and a rest."""
    for name in ("train_loss", "val_loss"):
        assert logged(processes, name)[0] == pytest.approx(logged("1", name)[0], abs=2e-6)


@pytest.mark.parametrize("run", ["1 x 4, part", "2 x 3, part", "2, part"])
def test_eval_iters_counts_batches_of_the_whole_run(found, run):
    """Not micro-batches, nor the share of a process."""
    for name in ("train_loss", "val_loss"):
        assert logged(run, name)[0] == pytest.approx(logged("1, part", name)[0], abs=2e-6)
        assert logged(run, name)[0] != pytest.approx(logged("1", name)[0], abs=1e-4)  # of the whole split


@pytest.mark.parametrize(
    ("run", "alone"), [("2", "1"), ("1 x 4, part", "1"), ("2 x 3, part", "1"), ("2, muon", "1, muon")]
)
def test_loss_and_gradient_norm_are_those_of_the_whole_batch(found, run, alone):
    for name in ("loss", "grad_norm"):
        assert len(logged(run, name)) == 4
        assert logged(run, name) == pytest.approx(logged(alone, name), rel=1e-4)


@pytest.mark.parametrize("run", ["1", "2", "1 x 4, part", "2 x 3, part"])
def test_the_speed_is_that_of_all_tokens_of_a_step(found, run):
    """A step takes a second, by a clock of the test's own."""
    assert logged(run, "tokens_per_second") == [24 * 16] * 4


def test_process_0_alone_speaks(found):
    for run, (processes, _) in RUNS.items():
        assert ("step 0: train loss" in found[0][run]["out"]) == (run != "unequal")
        assert (STOPPING in found[0][run]["errors"]) == (run == "SIGINT")
        for process in found[1:processes]:
            assert process[run]["out"] == process[run]["errors"] == ""


@pytest.mark.parametrize(
    ("run", "name", "step"), [("SIGTERM", "SIGTERM", 5), ("SIGINT", "SIGINT", 5), ("evaluating", "SIGTERM", 3)]
)
def test_a_signal_is_told_by_its_name_and_all_end_at_one_step_after_the_checkpoint(found, run, name, step):
    """torchrun ends the others when the first has left: none may leave while process 0 writes."""
    assert f"stopped by {name} after step {step}; the same command" in found[0][run]["out"]
    ends = [(process[run]["status"], process[run]["step"]) for process in found[:2]]
    assert ends == [(128 + getattr(signal, name), step)] * 2


def test_processes_with_different_settings_all_end_with_the_difference(found):
    for process in found[:2]:
        assert process["unequal"]["status"].startswith("not the same in every process: seed, weights; ")
