"""Measure the speed, against what this machine can do and, where you have a checkout of it, against nanoGPT.

    python tests/benchmark.py                                         what needs no other checkout
    python tests/benchmark.py --peer=../nanoGPT --only=loss,sample    side by side; only these parts
    python tests/benchmark.py --peer=../nanoGPT --write               side by side, into tests/benchmark.md, too

For a machine with nothing else to do: it measures on the CPU, in turns. Progress goes to stderr, the tables to stdout;
--write replaces those between two marks in the file and leaves the rest of it alone. The others run in a process of
their own, as their users run them; `transformers` is timed where it is installed.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache, partial
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
WRITTEN = Path(__file__).with_suffix(".md")
MARKS = ("<!-- tables of benchmark.py -->", "<!-- end of its tables -->")
sys.path.insert(0, str(REPOSITORY))

import train  # noqa: E402
from config import read  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from prepare import Tokens, load_meta, prepared  # noqa: E402

tell = partial(print, file=sys.stderr, flush=True)
REFERENCE = GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)
BATCH = 64
# nanoGPT's own recipe for a machine without a GPU, from its README at commit 3adf61e.
PEER_RECIPE = [
    "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
    "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
]  # fmt: skip
# The small recipe with a learning rate that ends where it passes that one's last loss.
TO_PEERS_LOSS = ["--max_iters=240", "--warmup_iters=20", "--learning_rate=8e-3", "--eval_interval=240"]


@dataclass
class Row:
    """Seconds of the same work, here and elsewhere; with an amount of it, shown as so many units a second."""

    work: str
    here: list[float]
    peer: list[float] = field(default_factory=list)
    transformers: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    amount: float | None = None
    unit: str = "s"

    def cells(self) -> list[str]:
        others = (self.peer, self.transformers, self.limit)
        return [self.work, self.figure(self.here), *(self.figure(s) + self.times(s) for s in others)]

    def figure(self, seconds: list[float]) -> str:
        figures = sorted(self.amount / s if self.amount else s for s in seconds)
        spread = f" ({short(figures[0])} to {short(figures[-1])})" if len(figures) > 1 else ""
        return f"{short(statistics.median(figures))} {self.unit}{spread}" if figures else ""

    def times(self, seconds: list[float]) -> str:
        """How many times as long it takes there."""
        return f": {statistics.median(seconds) / statistics.median(self.here):.2f}x" if seconds else ""


def short(figure: float) -> str:
    """Three digits: 0.0123, 12.3, 12,300."""
    return f"{float(f'{figure:.3g}'):,.0f}" if figure >= 100 else f"{figure:.3g}"


@dataclass
class Bench:
    """What every part measures with."""

    repeats: int
    scratch: Path
    flops: float  # a second, in a large matrix product of bfloat16
    bandwidth: float  # bytes a second, read from memory
    others: Executor  # the process that the others run in
    peer: Path | None = None  # a copy of nanoGPT's folder, with the text prepared
    growth: list[tuple[str, str, str]] = field(default_factory=list)  # lines of a table of their own

    def elsewhere(self, work: Callable[..., object], *arguments: object) -> Callable[[], object]:
        return lambda: self.others.submit(work, *arguments).result()

    def row(
        self, work: str, here: Callable, peer: Callable | None = None, other: Callable | None = None, **facts
    ) -> Row:
        """Time the works in turns, so that a slow minute of the machine meets all of them."""
        seconds = {each: [] for each in (here, peer, other) if each}
        for _ in range(self.repeats):
            for each in seconds:
                seconds[each].append(seconds_of(each))
        row = Row(work, seconds[here], seconds.get(peer, []), seconds.get(other, []), **facts)
        tell("  " + ", ".join(cell for cell in row.cells() if cell))
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of nanoGPT; a copy of it is run")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="some of %(default)s")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {WRITTEN.name}, too")
    parser.add_argument("--repeats", type=int, default=3, help="of each work (%(default)s)")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - PARTS.keys():
        parser.error(f"--only: there is no {', '.join(unknown)}; there is {', '.join(PARTS)}")
    if options.peer and not (options.peer / "model.py").exists():
        parser.error(f"--peer: there is no {options.peer / 'model.py'}")
    torch.manual_seed(0)
    prepared("shakespeare_char")
    others = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os.dup2, (2, 1))  # print to stderr
    with tempfile.TemporaryDirectory() as scratch, others, redirect_stdout(sys.stderr):
        flops, bandwidth, limit = limits()
        bench = Bench(options.repeats, Path(scratch), flops, bandwidth, others)
        if options.peer:
            bench.peer = prepared_peer(options.peer, bench.scratch)
        rows = []
        for part in options.only.split(","):
            tell(f"{part}:")
            rows += PARTS[part](bench)
    lines = [
        "`python tests/benchmark.py"
        f"{' --peer=../nanoGPT' * bool(options.peer)} --only={options.only}` on {torch.get_num_threads()} threads of "
        f"{cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}, {date.today()}."
        f"\n\n{limit}\n\nA figure is the median of {options.repeats} repeats, with the lowest and highest; `2x` is how "
        "many times as long the same work takes there.\n",
        "| work | here | nanoGPT | transformers | limit |\n| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]
    if bench.growth:
        lines += ["\nEach size doubled again and again, the others left alone:\n"]
        lines += ["| growth | median | from one to the next, times |\n| --- | --- | --- |"]
    lines += [f"| {' | '.join(line)} |" for line in bench.growth]
    print(tables := "\n".join(lines))
    if options.write:
        before, _, rest = WRITTEN.read_text().partition(MARKS[0])
        WRITTEN.write_text(f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", facts.read_text()) if facts.exists() else None
    return found[1] if found else "an unknown CPU"


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def limits() -> tuple[float, float, str]:
    """FLOP/s of a matrix product in bfloat16, bytes a second read from memory, each the best of ten, and in words."""
    flops = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, dtype=dtype)
        flops.append(2 * 2048**3 / min(seconds_of(lambda a=a: a @ a) for _ in range(10)))
    memory = torch.ones(2**28)
    bandwidth = memory.nbytes / min(seconds_of(memory.sum) for _ in range(10))
    text = (
        f"The limit is what the machine can do at best, measured in the same run: {flops[1] / 1e9:.0f} GFLOP/s in a "
        f"bfloat16 matrix product, {flops[0] / 1e9:.0f} in float32, {bandwidth / 1e9:.0f} GB/s read from memory."
    )
    return flops[1], bandwidth, text


# nanoGPT


def prepared_peer(folder: Path, scratch: Path) -> Path:
    """A copy of nanoGPT's folder, with our text prepared by its own script."""
    copy = Path(shutil.copytree(folder, scratch / "peer", ignore=shutil.ignore_patterns(".git", "out*", "*.bin")))
    prepare_as_peer(copy / "data" / "shakespeare_char", Path("data/shakespeare_char/input.txt"))
    return copy


def prepare_as_peer(folder: Path, text: Path) -> None:
    shutil.copy(text, folder / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)


@cache
def peer_model(peer: Path) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("peer_model", peer / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_model"] = module
    spec.loader.exec_module(module)
    shape = {name: value for name, value in asdict(REFERENCE).items() if name in module.GPTConfig.__dataclass_fields__}
    return module.GPT(module.GPTConfig(**shape))


# The parts


def loss(bench: Bench) -> list[Row]:
    """Wall time to the loss that nanoGPT's recipe ends at, from process start: import, evaluation, all of it."""
    here, peer = [], []
    for seed in range(1, bench.repeats + 1):
        argv = [str(REPOSITORY / "train.py"), str(REPOSITORY / "config" / "shakespeare_char_cpu.py"), "--device=cpu"]
        argv += [f"--out_dir={bench.scratch / 'out'}", "--init_from=scratch", *TO_PEERS_LOSS, f"--seed={seed}"]
        here.append(evaluations(argv, Path.cwd())[-1])
        if bench.peer:
            peer.append(evaluations(PEER_RECIPE, bench.peer)[-1])
    work = f"training ({' '.join(TO_PEERS_LOSS)}) to validation loss {spread([loss for _, loss in here])}"
    if peer:
        work += f", nanoGPT's to {spread([loss for _, loss in peer])}"
        if max(loss for _, loss in here) > min(loss for _, loss in peer):
            raise SystemExit(f"{work}: TO_PEERS_LOSS needs more steps")
    return [Row(work, [seconds for seconds, _ in here], [seconds for seconds, _ in peer])]


def spread(losses: Sequence[float]) -> str:
    low, middle, high = min(losses), statistics.median(losses), max(losses)
    return f"{middle:.4f}" + f" ({low:.4f} to {high:.4f})" * (len(losses) > 1)


def evaluations(argv: list[str], folder: Path) -> list[tuple[float, float]]:
    """Run a training: (seconds since its start, validation loss) at each evaluation."""
    start, found = time.perf_counter(), []
    with subprocess.Popen([sys.executable, "-u", *argv], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if evaluation := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
                found.append((time.perf_counter() - start, float(evaluation[1])))
                tell("  {:.1f} s: {:.4f}".format(*found[-1]))
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with status {process.returncode}")
    return found


def step(bench: Bench) -> list[Row]:
    """An optimizer step of the reference model: 64 sequences of 256 tokens, in 4 micro-batches."""
    if peer := bench.peer and bench.elsewhere(peer_step, bench.peer):
        peer()
    flops = GPT(REFERENCE).flops_per_token() * BATCH * REFERENCE.block_size
    limit = [flops / bench.flops]
    return [
        bench.row("training step, reference model, 16,384 tokens", our_step(), peer, limit=limit),
        bench.row("the same with dropout 0.2", our_step(dropout=0.2), limit=limit),
    ]


def our_step(**settings: object) -> Callable[[], None]:
    ours = {"device": "cpu", "init_from": "scratch", "dropout": 0.0}
    settings = ours | {"batch_size": BATCH, "gradient_accumulation_steps": 4} | settings
    config = read(train.TrainConfig, [f"--{name}={value}" for name, value in settings.items()])
    process = train.join_processes(config)
    meta = load_meta(config.dataset)
    tokens = Tokens(config.dataset, "train", meta, config.block_size)
    model = train.MODELS[config.model](config.model_config(meta["vocab_size"])).to(process.device)
    state = train.new_state(model, meta, config, process)
    model = train.compiled_and_parallel(state.model, config, process)

    def take() -> None:
        train.train_step(model, state, tokens, config, process)
        state.step += 1

    take()  # the first one also reserves memory
    return take


@cache
def peer_optimizer(peer: Path) -> torch.optim.Optimizer:
    return peer_model(peer).configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")


def peer_step(peer: Path) -> None:
    model, optimizer = peer_model(peer), peer_optimizer(peer)
    for _ in range(4):
        x = torch.randint(REFERENCE.vocab_size, (BATCH // 4, REFERENCE.block_size))
        (model(x, x)[1] / 4).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peer_sample(peer: Path, n: int) -> None:
    peer_model(peer).eval().generate(torch.zeros(n, 1, dtype=torch.long), 500, temperature=0.8)


def sample(bench: Bench) -> list[Row]:
    """500 tokens from the reference model, one text and ten at once, its window of 256 tokens sliding."""
    model, rows = GPT(REFERENCE), []
    hugging_face = importlib.util.find_spec("transformers")
    for what, dtype in (("sampling, reference model", torch.float32), ("the same in bfloat16", torch.bfloat16)):
        n_bytes = sum(parameter.nbytes for parameter in model.to(dtype).parameters())
        for n in (1, 10):
            here = partial(model.generate, torch.zeros(n, 1, dtype=torch.long), 500, 0.8)
            others = []
            if dtype == torch.float32:
                others = [bench.peer and bench.elsewhere(peer_sample, bench.peer, n)]
                others += [hugging_face and bench.elsewhere(transformers_sample, n)]
            facts = {"limit": [500 * n_bytes / bench.bandwidth], "amount": 500 * n, "unit": "tok/s"}
            rows.append(bench.row(f"{what}, {n} x 500 tokens", here, *others, **facts))  # each reads every weight once
    return rows


@cache
def transformers_model() -> torch.nn.Module:
    """The reference model in transformers, with a context of 512: its window cannot slide."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 65, "n_positions": 512, "n_layer": 6, "n_head": 6, "n_embd": 384}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()


def transformers_sample(n: int) -> None:
    idx = torch.zeros(n, 1, dtype=torch.long)
    mask = torch.ones_like(idx)
    transformers_model().generate(idx, attention_mask=mask, do_sample=True, max_new_tokens=500, pad_token_id=1)


def prepare(bench: Bench, megabytes: int = 100) -> list[Row]:
    text = made_text(bench, megabytes)
    folder = bench.peer and shutil.copytree(bench.peer / "data" / "shakespeare_char", bench.scratch / "peer_data")
    here, peer = partial(prepare_here, bench, text), folder and partial(prepare_as_peer, folder, text)
    return [bench.row(f"prepare.py, {megabytes} MB of text", here, peer, amount=megabytes, unit="MB/s")]


def made_text(bench: Bench, megabytes: int) -> Path:
    path = bench.scratch / f"{megabytes}.txt"
    once = Path("data/shakespeare_char/input.txt").read_bytes()
    path.write_bytes((once * (1 + megabytes * 10**6 // len(once)))[: megabytes * 10**6])
    return path


def prepare_here(bench: Bench, text: Path) -> int:
    """Prepare the text in a process of its own; returns its largest memory in bytes, 0 where the system hides it."""
    program = """if True:
        import os, sys, prepare
        prepare.main(sys.argv[1:])
        print(open("/proc/self/status").read() if os.path.exists("/proc/self/status") else "")
    """
    argv = [sys.executable, "-c", program, "--dataset=made", f"--input={text}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    status = subprocess.run(argv, cwd=bench.scratch, env=environment, check=True, capture_output=True, text=True).stdout
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(peak[1]) * 1024 if peak else 0


def growth(bench: Bench) -> list[Row]:
    """Each size doubled again and again, the others left alone."""
    base = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 32}
    doubled = {"n_layer": (2, 4, 8), "n_embd": (128, 256, 512), "batch_size": (16, 32, 64)}
    works = {
        f"training step, {name}": {
            size: our_step(**base | {"gradient_accumulation_steps": 1, name: size}) for size in sizes
        }
        for name, sizes in (doubled | {"block_size": (64, 128, 256, 512)}).items()
    }
    texts = {megabytes: made_text(bench, megabytes) for megabytes in (50, 100, 200, 400)}
    works["prepare.py, MB of text"] = {size: partial(prepare_here, bench, text) for size, text in texts.items()}
    for what, by_size in works.items():
        seconds = [statistics.median(bench.row(f"{what} {size}", work).here) for size, work in by_size.items()]
        factors = ", ".join(f"{after / before:.1f}" for before, after in itertools.pairwise(seconds))
        sizes, figures = ", ".join(map(str, by_size)), ", ".join(f"{s:.3g} s" for s in seconds)
        bench.growth.append((f"{what} {sizes}", figures, factors))
    peaks = ", ".join(f"{prepare_here(bench, text) / 1e6:.0f} MB" for text in texts.values())
    bench.growth.append(("the same, peak memory", peaks, ""))
    return []


PARTS = {part.__name__: part for part in (loss, step, sample, prepare, growth)}

if __name__ == "__main__":
    main()
