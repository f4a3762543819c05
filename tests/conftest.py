import hashlib
import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

# One thread in each of the many processes: the models are tiny, and threads that wait for each other take both cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONUNBUFFERED", None)  # few users set it, and it hides what is never flushed

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

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


@pytest.fixture
def server():
    """A web server on loopback. `answers` are (status, headers, body) in turn, the last one for ever."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            status, headers, body = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = 0
    server.url = f"http://127.0.0.1:{server.server_port}/text"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class OnTheCPU(TorchFunctionMode):
    """What is asked of a GPU the CPU does. `copies`: of each batch, whether it was pinned and not waited for."""

    def __init__(self):
        super().__init__()
        self.pinned, self.copies = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def on_gpu(value):
            return isinstance(value, str | torch.device) and str(value).startswith("cuda")

        if function is torch.Tensor.pin_memory:
            self.pinned.append(args[0])
            return args[0]
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        if function is torch.Tensor.to and any(map(on_gpu, args[1:])) and args[0].dtype == torch.int64:
            pinned = any(args[0] is tensor for tensor in self.pinned)
            self.copies.append((pinned, kwargs.get("non_blocking", False)))
        args = ["cpu" if on_gpu(value) else value for value in args]
        return function(*args, **{name: "cpu" if on_gpu(value) else value for name, value in kwargs.items()})


class GeneratorOnTheCPU(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs whose tensors lie on the CPU: unlike fake_cuda.py's, they have values. `current`: the one in use.

    bfloat16: those that have it; on the others, torch emulates it. `seeds`: of the GPUs' random numbers.
    """
    gpus = SimpleNamespace(current=0, bfloat16={0, 1}, seeds=[], mode=OnTheCPU())

    def use(device):
        gpus.current = torch.device(device).index

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: gpus.current,
        "set_device": use,
        "get_device_name": lambda device: "Some Card",
        "is_bf16_supported": lambda including_emulation=True: including_emulation or gpus.current in gpus.bfloat16,
        "manual_seed_all": gpus.seeds.append,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    monkeypatch.setattr("torch.Generator", GeneratorOnTheCPU)
    with gpus.mode:
        yield gpus


def ok(body):
    return 200, {"Content-Length": str(len(body))}, body


# Of FineWeb, by number; 0 is the validation shard.
SHARD_TOKENS = {
    number: np.random.default_rng(number).integers(50257, size=500 + number).astype("<u2") for number in range(5)
}


def shard(tokens, magic=20240520, version=1, n_tokens=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if n_tokens is None else n_tokens
    return header.tobytes() + tokens.tobytes()


@pytest.fixture
def hub(folder, server, monkeypatch):
    """A hub with small shards of FineWeb: `bodies` by number, and the numbers that were `asked` for."""

    def get(handler):
        base = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_"
        kind, number = re.fullmatch(rf"{base}(val|train)_(\d{{6}}).bin", handler.path).groups()
        number = int(number)
        assert (kind == "val") == (number == 0)
        server.asked.append(number)
        body = server.bodies[number]
        handler.send_response(200 if body else 500)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2 if server.asked.count(number) in server.broken else None])

    server.RequestHandlerClass.do_GET = get
    server.bodies = {number: shard(tokens) for number, tokens in SHARD_TOKENS.items()}
    server.asked, server.broken = [], ()
    monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/text"))
    return server


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
    found = re.findall(
        r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)(?:, [\d.]+ bits per byte)?$", text, re.MULTILINE
    )
    return {int(step): (float(train_loss), float(val_loss)) for step, train_loss, val_loss in found}


def rows(path="out/log.csv"):
    """log.csv as a list of dicts of strings."""
    header, *lines = Path(path).read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def reports(path="out/log.csv"):
    """The rows of log.csv with the metrics of a step."""
    return [row for row in rows(path) if row["loss"]]


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


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """data/shakespeare_char, as `dataset` makes it, and out/ of a run of 20 steps: made once, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("words.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS, size=5000))[:20_000])
        prepare.main(["--dataset=shakespeare_char", "--input=words.txt"])
        train_here()
    return folder


@pytest.fixture
def trained(trained_once, folder):
    """A folder of its own with what `trained_once` made."""
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    return folder
