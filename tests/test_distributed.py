"""Real processes, started by torchrun or side by side, joined by gloo on loopback."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, STOPPING, WORDS, checkpoint, free_port, losses, rows, tiny, train_here

import prepare


def torchrun(*arguments, processes=2):
    """Run train.py in several processes; torchrun picks a free port."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    argv += [f"--nproc_per_node={processes}", str(REPOSITORY / "train.py"), *arguments]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            out, errors = running.communicate(timeout=120)
        finally:
            running.kill()
    return subprocess.CompletedProcess(argv, running.returncode, out, errors)


def step_losses(path):
    return [float(row["loss"]) for row in rows(path) if row["lr"]]


@pytest.mark.parametrize(("shares", "optimizer"), [(1, "muon"), (2, "adamw")])
def test_two_processes_learn_what_one_learns(dataset, capsys, shares, optimizer):
    settings = {"max_iters": 40, "dropout": 0.0, "log_interval": 1, "optimizer": optimizer}
    train_here(**settings, out_dir="one")
    alone = losses(capsys.readouterr().out)
    ended = torchrun(*tiny(**settings, out_dir="two", gradient_accumulation_steps=shares))
    assert ended.returncode == 0, ended.stderr
    assert len(step_losses("two/log.csv")) == 40
    assert step_losses("two/log.csv") == pytest.approx(step_losses("one/log.csv"), abs=2e-4)
    together = losses(ended.stdout)
    assert together.keys() == alone.keys() == {0, 10, 20, 30, 40}
    for step in alone:
        assert together[step] == pytest.approx(alone[step], abs=3e-4)
    assert ended.stdout.count("step 40: train loss") == 1  # only rank 0 speaks
    assert not any(name.startswith("module.") for name in checkpoint("two/ckpt.pt")["model"])


def test_a_run_goes_on_with_another_number_of_processes(dataset):
    settings = {"dropout": 0.0, "log_interval": 1, "lr_decay_iters": 30}
    train_here(**settings, max_iters=30, out_dir="whole")
    train_here(**settings, max_iters=10)
    ended = torchrun(*tiny(**settings, max_iters=20))
    assert "resuming from out/ckpt.pt at step 10" in ended.stdout
    train_here(**settings, max_iters=30)
    assert step_losses("out/log.csv") == pytest.approx(step_losses("whole/log.csv"), abs=2e-4)


def test_process_0_prepares_the_data_while_the_others_wait(folder):
    path = folder / "data" / "shakespeare_char" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_text("To be, or not to be. " * 500)
    ended = torchrun(*tiny())
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("9,450 train tokens") == 1
    assert checkpoint()["step"] == 20


def test_the_others_wait_for_a_download_that_takes_longer_than_any_timeout(folder):
    lines = """if True:
        import time
        from datetime import timedelta
        from torch.distributed import distributed_c10d
        import train

        distributed_c10d.default_pg_timeout = timedelta(seconds=2)
        train.prepared = lambda dataset: time.sleep(4) or {}
        process = train.join_processes(train.TrainConfig(device="cpu"))
        if process.rank == 0:
            train.prepared("fineweb")
        process.barrier()
        print("prepared")
        """
    argv = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
    Path("waits.py").write_text(textwrap.dedent(lines.removeprefix("if True:\n")))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    argv = [sys.executable, "-m", *argv, "waits.py"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=100, env=environment)
    assert ended.stdout.count("prepared") == 2, ended.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 3},
         "batch_size (8) must be divisible by the number of processes (2) x gradient_accumulation_steps (3)"),
        ({"init_from": "resume"}, "there is no out/ckpt.pt to resume; --init_from=scratch starts a new run"),
        ({"learning_rate": 1e30, "warmup_iters": 0}, "loss is "),
    ],
)  # fmt: skip
def test_a_mistake_of_all_processes_is_said_by_process_0(dataset, changes, message):
    """torchrun ends the others before they say it too, and adds its own report of the failure."""
    ended = torchrun(*tiny(**changes))
    assert ended.returncode != 0
    assert ended.stderr.count(f"train.py, process 0: {message}") == 1
    assert "process 1:" not in ended.stderr
    assert 'train.py", line' not in ended.stderr


@pytest.mark.parametrize("recipe", ["shakespeare_char_cpu", "gpt2_124m"])
def test_recipes_run_in_two_processes(dataset, recipe):
    """The recipe's own settings, but for the size and the data."""
    (dataset.parent / "fineweb").symlink_to(dataset)
    sizes = ["--n_layer=1", "--n_embd=24", "--n_head=2", "--block_size=32", "--max_iters=2", "--eval_iters=1"]
    sizes += ["--batch_size=8", "--gradient_accumulation_steps=2", "--device=cpu"]
    ended = torchrun(str(REPOSITORY / "config" / f"{recipe}.py"), *sizes)
    assert ended.returncode == 0, ended.stderr
    assert "step 2: train loss" in ended.stdout


# Runs of one to four processes, all in one start


ONE_OF_TWO = """
import json
import os
import sys

import torch

import train
from config import UserError

found, top = {}, os.getcwd()
for name, port, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    os.chdir(f"{top}/{name}/{os.environ['RANK']}")
    try:
        train.main(argv)
    except UserError as error:
        found[name] = str(error)
    torch.distributed.destroy_process_group()
print(json.dumps(found))
"""


def test_machines_whose_files_or_commands_differ_do_not_train_together(dataset, folder):
    """They would, with a loss that means nothing."""

    def meta(**changes):
        path = Path("data/shakespeare_char/meta.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def token(split, place):
        ids = np.fromfile(f"data/shakespeare_char/{split}.bin", "<u2")
        ids[place] ^= 1
        ids.tofile(f"data/shakespeare_char/{split}.bin")

    differences = {  # of the second machine: what is said of it
        "source": (lambda: meta(source="elsewhere"), None),
        "meta": (lambda: meta(val_bytes=5), "meta.json"),
        "first": (lambda: token("train", 0), "data/shakespeare_char/train.bin"),
        "last": (lambda: token("val", -1), "data/shakespeare_char/val.bin"),
        "step": (lambda: train_here(max_iters=15), "step of out/ckpt.pt"),
        "settings": (lambda: None, "settings"),
    }
    train_here(max_iters=10)
    own = {0: [], 1: []}
    for name, (differ, _) in differences.items():
        port = free_port()
        for rank, runs in own.items():
            shutil.copytree("data", f"{name}/{rank}/data")
            shutil.copytree("out", f"{name}/{rank}/out")
            with contextlib.chdir(f"{name}/{rank}"):
                if rank == 1:
                    differ()
            runs.append((name, port, tiny(learning_rate=1e-3 * (1 + (rank == 1 and name == "settings")))))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    with ExitStack() as both:
        started = []
        for rank, runs in own.items():
            ranks = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            argv = [sys.executable, "-c", ONE_OF_TWO, json.dumps(runs)]
            started.append(both.enter_context(subprocess.Popen(argv, env=environment | ranks, stdout=subprocess.PIPE)))
            both.callback(started[-1].kill)
        ends = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]
    wrong = {name: what for name, (_, what) in differences.items() if what}
    advice = "; all need the same command and the same files"
    assert ends == [{name: f"not the same in every process: {what}{advice}" for name, what in wrong.items()}] * 2
    assert checkpoint("source/0/out/ckpt.pt")["step"] == 20


ONE_OF_FOUR = """if True:
    import contextlib, io, json, os, signal, sys, time
    import torch
    import train

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
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
                status = train.main(argv)
                on_disk = torch.load(f"{name}/ckpt.pt", weights_only=True)["step"]  # when this process is through
            found[name] = {"status": status, "out": out.getvalue(), "errors": errors.getvalue(), "step": on_disk}
            if processes > 1:
                torch.distributed.destroy_process_group()
    print(json.dumps(found))
"""
SHORT = {"dataset": "long", "batch_size": 24, "dropout": 0.0, "log_interval": 1}
RUNS = {  # name: (processes, settings); who has nothing to do in a run waits for the next, so the large ones come first
    "4": (4, {"max_iters": 1, "eval_iters": 0}),
    "3": (3, {"max_iters": 1, "eval_iters": 0}),
    "2": (2, {"max_iters": 4, "eval_iters": 0, "eval_interval": 100}),
    "2, part": (2, {"max_iters": 1, "eval_iters": 5}),
    "2 x 3, part": (2, {"max_iters": 4, "gradient_accumulation_steps": 3, "eval_iters": 5, "eval_interval": 100}),
    "SIGTERM": (2, {"max_iters": 100, "eval_iters": 1, "eval_interval": 100}),
    "SIGINT": (2, {"max_iters": 100, "eval_iters": 1, "eval_interval": 100}),
    "evaluating": (2, {"max_iters": 100, "eval_iters": 1, "eval_interval": 2}),
    "1": (1, {"max_iters": 4, "eval_iters": 0, "eval_interval": 100}),
    "1, part": (1, {"max_iters": 1, "eval_iters": 5}),
    "1 x 4, part": (1, {"max_iters": 4, "gradient_accumulation_steps": 4, "eval_iters": 5, "eval_interval": 100}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four processes saw of each run; the current folder holds the runs' own."""
    with pytest.MonkeyPatch.context() as monkeypatch, ExitStack() as all_of_them:
        monkeypatch.chdir(tmp_path_factory.mktemp("together"))
        text = " ".join(np.random.default_rng(0).choice(WORDS, size=30_000))[:100_000]
        with open("long.txt", "w") as file:
            file.write(text)
        prepare.main(["--dataset=long", "--input=long.txt", "--val_fraction=0.5"])
        runs = [(name, n, free_port(), tiny(**SHORT | own, out_dir=name)) for name, (n, own) in RUNS.items()]
        argv = [sys.executable, "-c", ONE_OF_FOUR, json.dumps(runs)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1"}
        pipes, started = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}, []
        for rank in range(4):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(all_of_them.enter_context(subprocess.Popen(argv, env=environment | own, **pipes)))
            all_of_them.callback(started[-1].kill)
        ends = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0] * 4, ends
        yield [json.loads(out) for out, _ in ends]


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


@pytest.mark.parametrize("run", ["2", "1 x 4, part", "2 x 3, part"])
def test_loss_and_gradient_norm_are_those_of_the_whole_batch(found, run):
    for name in ("loss", "grad_norm"):
        assert len(logged(run, name)) == 4
        assert logged(run, name) == pytest.approx(logged("1", name), rel=1e-4)


@pytest.mark.parametrize("run", ["1", "2", "1 x 4, part", "2 x 3, part"])
def test_the_speed_is_that_of_all_tokens_of_a_step(found, run):
    """A step takes a second, by a clock of the test's own."""
    assert logged(run, "tokens_per_second") == [24 * 16] * 4


@pytest.mark.parametrize("run", [name for name, (processes, _) in RUNS.items() if processes > 1])
def test_process_0_alone_speaks(found, run):
    assert "step 0: train loss" in found[0][run]["out"]
    assert (STOPPING in found[0][run]["errors"]) == (run == "SIGINT")
    for process in found[1 : RUNS[run][0]]:
        assert process[run]["out"] == process[run]["errors"] == ""


@pytest.mark.parametrize(
    ("run", "name", "step"), [("SIGTERM", "SIGTERM", 5), ("SIGINT", "SIGINT", 5), ("evaluating", "SIGTERM", 3)]
)
def test_a_signal_is_told_by_its_name_and_all_end_at_one_step_after_the_checkpoint(found, run, name, step):
    """torchrun ends the others when the first has left: none may leave while process 0 writes."""
    assert f"stopped by {name} after step {step}; the same command" in found[0][run]["out"]
    ends = [(process[run]["status"], process[run]["step"]) for process in found[:2]]
    assert ends == [(128 + getattr(signal, name), step)] * 2
