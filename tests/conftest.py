import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# One thread in each of the many processes: the models are tiny, and threads that wait for each other take both cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import config
import prepare
import train
from prepare import PrepareConfig

REPOSITORY = Path(__file__).parent.parent
COPIES = [REPOSITORY.parent / "shared" / "tinyshakespeare", REPOSITORY / "data" / "shakespeare_char"]
SHAKESPEARE = next(  # the real text, where it is at hand: README's first training downloads it
    (path for path in (copy / "input.txt" for copy in COPIES) if path.exists()
     and hashlib.sha256(path.read_bytes()).hexdigest() == prepare.SHAKESPEARE_SHA256), None,
)  # fmt: skip
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script ignores in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
WORDS = [
    "the",
    "king",
    "and",
    "queen",
    "of",
    "this",
    "fair",
    "land",
    "did",
    "speak",
    "to",
    "all",
    "men",
    "with",
    "love",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory; `config/` holds the recipes."""
    (tmp_path / "config").symlink_to(REPOSITORY / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dataset(folder, capsys):
    """data/shakespeare_char with 20,000 characters of made-up words."""
    text = " ".join(np.random.default_rng(0).choice(WORDS, size=5000))[:20_000]
    path = folder / "data" / "shakespeare_char" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    prepare.prepare(PrepareConfig())
    capsys.readouterr()
    return path.parent


TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8, "dropout": 0.1, "max_iters": 20,
    "eval_interval": 10, "eval_iters": 4, "log_interval": 5, "warmup_iters": 4, "device": "cpu", "dtype": "float32",
    "optimizer": "adamw", "learning_rate": 1e-3, "min_lr": 1e-4, "weight_decay": 0.1,
}  # fmt: skip


def tiny(**changes):
    """The --key=value of a run that takes a second."""
    return [f"--{name}={value}" for name, value in (TINY | changes).items()]


def losses(text):
    """{step: (train loss, validation loss)} of the evaluation lines."""
    found = re.findall(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)$", text, re.MULTILINE)
    return {int(step): (float(train_loss), float(val_loss)) for step, train_loss, val_loss in found}


def rows(path="out/log.csv"):
    """log.csv as a list of dicts of strings."""
    header, *lines = Path(path).read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def checkpoint(path="out/ckpt.pt"):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two nested structures hold the same values, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def command(program, *arguments, **settings):
    """Run a program as a user would, in the current folder."""
    argv = [sys.executable, str(REPOSITORY / program), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, **settings)


STOPPING = config.STOPPING + "\n"  # the answer to Ctrl-C


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def signal_in_step(monkeypatch, number, last):
    """The process gets the signal while it takes the step after `last`."""

    def step(model, state, *rest, original=train.train_step):
        if state.step == last:
            os.kill(os.getpid(), number)
        return original(model, state, *rest)

    monkeypatch.setattr(train, "train_step", step)


def without_progress(errors):
    return re.sub(r"^(step \d+/|evaluating ).*\n", "", errors, flags=re.MULTILINE)


def train_here(**changes):
    train.main(tiny(**changes))
