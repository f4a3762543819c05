"""Real processes, started by torchrun, joined by gloo on loopback."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY, checkpoint, losses, rows, tiny, train_here


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 3},
         "batch_size (8) must be divisible by the number of processes (2) x gradient_accumulation_steps (3)"),
        ({"init_from": "resume"}, "there is no out/ckpt.pt to resume; --init_from=scratch starts a new run"),
        ({"learning_rate": 1e30, "warmup_iters": 0}, "loss is "),
    ],
)  # fmt: skip
def test_a_mistake_of_all_processes_is_said_once(dataset, changes, message):
    """By train.py itself; torchrun adds its own report of the failure."""
    ended = torchrun(*tiny(**changes))
    assert ended.returncode != 0
    assert ended.stderr.count(f"train.py: {message}") == 1
    assert 'train.py", line' not in ended.stderr


@pytest.mark.parametrize("recipe", ["shakespeare_char_cpu", "gpt2_124m"])
def test_recipes_run_in_two_processes(dataset, recipe):
    """The recipe's own settings, but for the size and the data."""
    (dataset.parent / "openwebtext").symlink_to(dataset)
    sizes = ["--n_layer=1", "--n_embd=24", "--n_head=2", "--block_size=32", "--max_iters=2", "--eval_iters=1"]
    sizes += ["--batch_size=8", "--gradient_accumulation_steps=2", "--device=cpu"]
    ended = torchrun(str(REPOSITORY / "config" / f"{recipe}.py"), *sizes)
    assert ended.returncode == 0, ended.stderr
    assert "step 2: train loss" in ended.stdout
