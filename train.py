"""Train a GPT. Read `main` and `train` for the run from start to end, `train_step` for one step.

One idea: step k of a run is a pure function of (weights, optimizer state, config, data, k). Its batch is drawn from
(seed, k), its dropout from (seed, k, rank, micro-batch), and every evaluation reads the same blocks. So a
killed run resumes from its last checkpoint (bit for bit on a CPU), and one process and eight see the same batches.

    python train.py                                          the reference model on Tiny Shakespeare
    python train.py config/shakespeare_char_cpu.py           a small one, a minute or two on a laptop
    torchrun --nproc_per_node=8 train.py --n_layer=12        many GPUs, other values
"""

from __future__ import annotations

import math
import os
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw as adamw_step

# isort: off
from config import (
    ConfigError, StopSignals, UserError, as_config_error, convert, explained, flag, key, progress, rank_and_size, read,
    run, show,
)  # fmt: skip
from model import (
    GPT, MODELS, GPTConfig, LanguageModel, checkpoint_in, choose_device, open_model, peak_flops, training_dtype,
)  # fmt: skip
from prepare import (
    TOKENIZER_FACTS, Tokens, checkpoint_facts, dataset_folder, load_meta, locked, prepared, quiet_hub, replacing,
)  # fmt: skip
# isort: on

# Runs of more FLOPs than this are compiled. On an H100, compiling takes 18.5 s and then saves 2.5 of the 8.2 ms of a
# step of 1.2e12 FLOPs (64 x 256 tokens of the reference model; torch 2.11).
COMPILE_FROM = 1e16
# FLOP/s of one CPU thread in training: 2 threads took 1.3 hours for the 1.2e15 of the reference recipe on an AMD EPYC
# (family 26), 2 hours on an Intel Xeon with AMX (torch 2.13).
CPU_FLOPS = 1e11
STARTS = ("auto", "scratch", "resume")  # init_from is one of these or names pretrained weights


@dataclass
class TrainConfig:
    """Train a GPT. The same command typed again resumes where the last one stopped."""

    given = frozenset()  # the names of the keys that a recipe or the command sets; config.read fills it in

    out_dir: str = key("out", "folder for checkpoints and log", "run")
    dataset: str = key("shakespeare_char", "folder under data/, made by prepare.py")
    init_from: str = key(
        "auto",
        "what to start from\n"
        "auto: out_dir's checkpoint, where there is one, else random weights\n"
        "resume: out_dir's checkpoint\n"
        "scratch: random weights; overwrites the run in out_dir\n"
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl: pretrained weights from the Hugging Face hub\n"
        "FOLDER: weights in Hugging Face's format, or of a run\n"
        "FILE: a checkpoint, nanoGPT's too",
        also="resume checkpoint",
    )

    model: Literal["gpt", "bigram"] = key("gpt", "what to train", "model")
    n_layer: int = key(6, "blocks", least=0)
    n_head: int = key(6, "attention heads in each block", least=1)
    n_embd: int = key(384, "channels", least=1)
    block_size: int = key(256, "longest context, in tokens", least=1)
    dropout: float = key(0.1, "share of activations dropped in training", least=0, below=1)
    bias: bool = key(False, "biases in linear layers and layer norms")
    feed_forward: bool = key(True, "a feed-forward layer after attention")
    residual: bool = key(True, "residual connections")
    layer_norm: bool = key(True, "layer norms")

    batch_size: int = key(32, "sequences in one step, over all processes together", "batch and optimizer", least=1)
    gradient_accumulation_steps: int = key(1, "micro-batches into which each process splits its share", least=1)
    optimizer: Literal["adamw", "muon"] = key("muon", "muon: for the blocks' matrices; adamw wants lower rates")
    learning_rate: float = key(8e-3, "peak learning rate", also="lr", least=0)
    min_lr: float = key(0.0, "learning rate at the end of the decay", least=0)
    warmup_iters: int = key(50, "steps of linear warm-up", least=0)
    lr_decay_iters: int | None = key(None, "step at which the decay ends; None: max_iters", least=1)
    decay_lr: bool = key(True, "cosine decay after the warm-up; False: stay at the peak")
    max_iters: int = key(2000, "optimizer steps", also="epochs", least=1)
    weight_decay: float = key(1.5, "share of a matrix that a step takes away, times the learning rate", least=0)
    beta1: float = key(0.9, "AdamW's decay rate for the mean of the gradients", least=0, below=1)
    beta2: float = key(0.99, "AdamW's decay rate for the mean of their squares", least=0, below=1)
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", least=0)

    eval_interval: int = key(250, "steps between evaluations, each of which writes a checkpoint", "evaluation", least=1)
    eval_iters: int = key(0, "batches of each evaluation; 0: the whole validation split", least=0)
    eval_only: bool = key(False, "evaluate once and end, writing nothing")
    log_interval: int = key(10, "steps between rows of log.csv", least=1)

    seed: int = key(1337, "random seed of initial weights, batches and dropout", "machine", least=0, below=2**63)
    device: str = key("auto", "cuda, cuda:N, mps or cpu; auto: the first that is available", also="gpu backend")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "dtype of matrix products; auto: the fastest safe one; float32: without TF32"
    )
    compile: Literal["auto"] | bool = key("auto", "torch.compile; auto: on cuda, for long runs, else CUDA graphs")
    deterministic: bool = key(False, "repeat a run bit for bit on cuda, too; slower")
    tensorboard: bool = key(False, "also write curves for TensorBoard to out_dir", also="wandb_log")

    def __post_init__(self):
        if not self.out_dir:
            raise ValueError("out_dir is empty: it must name a folder")
        dataset_folder(self.dataset)
        if self.init_from not in STARTS:
            self.init_from = os.path.normpath(self.init_from)

    def check(self, world_size: int) -> None:
        """Raises ConfigError for keys that do not go together."""
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise ConfigError(f"min_lr ({self.min_lr}) must not be above learning_rate ({self.learning_rate})")
        with as_config_error():
            self.model_config(vocab_size=1)
        self.micro_batch_size(world_size)

    def path(self, name: str) -> Path:
        return Path(self.out_dir) / name

    def model_config(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in MODEL_KEYS})

    def micro_batch_size(self, world_size: int) -> int:
        """Sequences that one process reads at a time. Raises ConfigError when the batch cannot be divided."""
        rows, rest = divmod(self.batch_size, world_size * self.gradient_accumulation_steps)
        if rest:
            shares = f"processes ({world_size}) x gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            raise ConfigError(f"batch_size ({self.batch_size}) must be divisible by the number of {shares}")
        return rows


# To add a key of the model, add a field above and one of the same name to GPTConfig.
MODEL_KEYS = [name for name in TrainConfig.__annotations__ if name in GPTConfig.__annotations__]


# The run


def main(argv: list[str]) -> int | None:
    """Train; returns the exit status of a run that a signal stopped."""
    config = read(TrainConfig, argv)
    # What to type if it is stopped; asked before `start`, which sets init_from to the one that the run began with.
    again = "the same command without --init_from" if config.init_from == "scratch" else "the same command"
    writing = rank_and_size()[0] == 0 and not config.eval_only
    with locked(config.path("lock")) if writing else nullcontext():
        state, splits, process = start(config)
        log = Log(config, state, process)
        if config.eval_only:
            log.show_evaluation(evaluate(state, splits, config, process))
            return None
        stop = train(state, splits, log, config, process)
    if stop:
        show(f"stopped by {signal.Signals(stop).name} after step {state.step}; {again} resumes")
        return 128 + stop
    best = f"best validation loss {state.best_val_loss:.4f} at step {state.best_step}, last {log.val_loss:.4f}"
    show(f"{best}, after {log.cost()}; try python sample.py {flag('out_dir', config.out_dir)}")
    return None


def train(state: State, splits: dict[str, Tokens], log: Log, config: TrainConfig, process: Process) -> int:
    """Take steps up to max_iters; returns the number of the signal that ended the run early, else 0.

    A resumed run enters at the head of the loop, at ckpt.pt's step: if an evaluation is due there, it is done again.
    """
    model = compiled_and_parallel(state.model, config, process)
    with StopSignals() as signals:
        while True:
            # All processes agree on it. A signal during an evaluation is seen after one more step; during the last
            # evaluation it changes nothing, for the run is done.
            stop = process.max_over_processes(signals.received)
            evaluating = evaluation_due(state.step, config)
            if evaluating or stop:  # saved first, so that a kill during the evaluation costs no step
                state.save("ckpt.pt", config, process)
            if stop:
                break
            if evaluating:
                metrics = evaluate(state, splits, config, process)
                state.keep_if_best(metrics["val_loss"], config, process)
                log.evaluation(metrics)
            if state.step >= config.max_iters:
                break
            metrics = train_step(model, state, splits["train"], config, process)
            state.step += 1
            if state.step in (1, config.max_iters) or state.step % config.log_interval == 0:
                log.report(metrics)
    process.barrier()  # process 0 may still be saving, and torchrun may end it when others have exited
    return stop


def evaluation_due(step: int, config: TrainConfig) -> bool:
    return step % config.eval_interval == 0 or step >= config.max_iters


# One step


def train_step(model: Callable, state: State, tokens: Tokens, config: TrainConfig, process: Process) -> dict:
    """One step down the gradient of batch `state.step`.

    `model` has the weights of `state.model`, compiled and parallel. Returns metrics, scalars on the device, which
    `Log.report` averages over the processes: one more here becomes a column of log.csv.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, config)
    micro_steps = config.gradient_accumulation_steps
    total_loss = torch.zeros((), device=process.device)
    for micro_step in range(micro_steps):
        x, y = batch(tokens, state.step, micro_step, config, process)
        seed_dropout(state.step, micro_step, config, process)
        # Gradients are all-reduced once, in the backward pass of the last micro-batch.
        with model.no_sync() if process.world_size > 1 and micro_step < micro_steps - 1 else nullcontext():
            with process.autocast():
                _, loss = model(x, y, need_logits=False)
            state.scaler.scale(loss / micro_steps).backward()
        total_loss += loss.detach() / micro_steps
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    # With DDP they are zeroed, not dropped: they are views of its buckets.
    state.model.zero_grad(set_to_none=process.world_size == 1)
    return {"loss": total_loss, "grad_norm": grad_norm}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to `learning_rate`, then half a cosine down to `min_lr` (Loshchilov & Hutter, 2017)."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    if not config.decay_lr:
        return config.learning_rate
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    fraction = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * fraction)) / 2


def batch(tokens: Tokens, step: int, micro_step: int, config: TrainConfig, process: Process) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, block_size) of one micro-batch of a step.

    Every process draws the starts of the whole batch and takes its share, so the batch is the same for any number.
    """
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(len(tokens) - config.block_size, size=config.batch_size)
    rows = config.micro_batch_size(process.world_size)
    offset = (process.rank * config.gradient_accumulation_steps + micro_step) * rows
    return inputs_and_targets(tokens, starts[offset : offset + rows], config.block_size, process.device)


def seed_dropout(step: int, micro_step: int, config: TrainConfig, process: Process) -> None:
    seeds = np.random.SeedSequence((config.seed, step, process.rank, micro_step))
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))


def inputs_and_targets(tokens: Tokens, starts: np.ndarray, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The blocks (B, length) that begin at `starts` (B,), and the same shifted by one: the next token at each place."""
    rows = torch.from_numpy(tokens.blocks(starts, length))  # (B, length + 1)
    if device.type == "cuda":
        rows = rows.pin_memory()  # so that the copy is asynchronous
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


# The optimizer


class Optimizer:
    """AdamW (Loshchilov & Hutter, 2019), with weight decay on matrices only, not on gains and biases.

    optimizer="muon": the matrices inside the blocks step along their momentum made orthogonal (Jordan et al., 2024), so
    that no direction dominates. Steps are scaled to AdamW's size (Liu et al., 2025); the best rates are still higher.

    Any of torch.optim's classes may take its place: the run uses param_groups, step, state_dict and load_state_dict.
    Their AdamW is called as a function, because to make an object of the class imports torch.compile: 4.6 of the 13.3 s
    before the first step of the reference run on an H100 (torch 2.11).
    """

    def __init__(self, model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32):
        self.dtype = torch.float32 if dtype == torch.float16 else dtype  # of Muon's products; float16 underflows
        self.betas = {"beta1": config.beta1, "beta2": config.beta2}
        groups = defaultdict(dict)  # parameters that are updated together, by name; those of a block are called *.h.N.*
        for name, p in model.named_parameters():
            if config.optimizer == "muon" and p.dim() == 2 and ".h." in name:
                groups["muon", p.shape][name] = p
            else:
                groups["adamw", p.dim() == 2][name] = p
        self.param_groups, self.state = [], {}
        for (rule, _), named in groups.items():
            params = list(named.values())
            decay = config.weight_decay if params[0].dim() == 2 else 0.0
            if rule == "muon":
                moments = {"momentum": torch.zeros_like(torch.stack(params))}  # one stack of all: (n, rows, columns)
            else:  # lists, of a tensor for each parameter
                moments = {name: [torch.zeros_like(p) for p in params] for name in ("mean", "square")}
                moments["steps"] = [torch.zeros((), device=p.device) for p in params]
            group = {"params": params, "lr": 0.0, "weight_decay": decay, "update": getattr(self, rule)}
            self.param_groups.append(group | moments)
            # By name, for checkpoints. To iterate over a stack gives views of it: `load_state_dict` copies into them.
            for moment, values in moments.items():
                for name, value in zip(named, values, strict=True):
                    self.state[f"{name}.{moment}"] = value

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["update"](group)

    def adamw(self, group: dict) -> None:
        gradients = [p.grad for p in group["params"]]
        maxima = []  # of the squares, for amsgrad
        tensors = (group["params"], gradients, group["mean"], group["square"], maxima, group["steps"])
        rates = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": 1e-8}
        adamw_step(*tensors, **self.betas, **rates, fused=True, amsgrad=False, maximize=False)

    def muon(self, group: dict) -> None:
        lr, momentum = group["lr"], group["momentum"]
        gradients = torch.stack([p.grad for p in group["params"]])  # (n, rows, columns): all at once
        momentum.lerp_(gradients, 1 - 0.95)
        directions = orthogonal(gradients.lerp(momentum, 0.95).to(self.dtype))  # Nesterov's: one step ahead
        for p, direction in zip(group["params"], directions, strict=True):
            p.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-0.2 * math.sqrt(max(p.shape)) * lr)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{"state": the moments of each parameter, by their names}"""
        return {"state": self.state}

    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Raises ValueError for a state of other parameters, or of another optimizer."""
        if {name: m.shape for name, m in saved["state"].items()} != {name: m.shape for name, m in self.state.items()}:
            raise ValueError("its optimizer state does not fit its weights")
        for name, moment in self.state.items():
            moment.copy_(saved["state"][name])


def orthogonal(x: Tensor) -> Tensor:
    """The matrices (n, rows, columns) with all singular values brought near 1, by five Newton-Schulz steps."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):  # x = 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


# Evaluation


def evaluate(state: State, splits: dict[str, Tokens], config: TrainConfig, process: Process) -> dict[str, float]:
    """The mean losses of both splits, over as many tokens of each: `eval_iters` batches, or the whole val split's.

    Of the val split these are the first ones, so that losses compare between runs. Of the train split they are spread
    over all of it, for its beginning may be easier. Bits per byte are known where the whole val split is read.
    """
    train, val = splits["train"], splits["val"]
    whole = len(val) - 1  # tokens to predict
    n_tokens = min((config.eval_iters * config.batch_size * config.block_size) or whole, whole)
    metrics = {
        "train_loss": mean_loss(state.model, train, n_tokens, config, process, spread=True),
        "val_loss": mean_loss(state.model, val, n_tokens, config, process),
    }
    if val.n_bytes and n_tokens == whole:
        metrics["bits_per_byte"] = metrics["val_loss"] / math.log(2) * len(val) / val.n_bytes
    return metrics


@torch.no_grad()
def mean_loss(
    model: LanguageModel, tokens: Tokens, n_tokens: int, config: TrainConfig, process: Process, spread: bool = False
) -> float:
    """Mean loss, in nats, of predicting the first `n_tokens` tokens of a split, or as many `spread` over all of it.

    The processes share the work. The model is the uncompiled one: these batches differ in shape from training's.
    """
    at_once = 2**16 if process.device.type == "cuda" else 2**13  # tokens that keep the device busy
    rows = max(config.micro_batch_size(process.world_size), at_once // config.block_size)
    n_tokens = min(n_tokens, len(tokens) - 1)
    among = len(tokens) - 1 if spread else n_tokens  # the tokens over which the blocks lie
    batches = evaluation_batches(n_tokens, among, config.block_size, rows)
    model.eval()
    sums = [torch.zeros((), device=process.device)]  # of the losses in each batch; a process may get no batch
    for i in range(process.rank, len(batches), process.world_size):
        progress.show(f"evaluating {tokens.path}: {i / len(batches):.0%}")
        x, y = inputs_and_targets(tokens, *batches[i], process.device)
        with process.autocast():
            _, loss = model(x, y, need_logits=False)
        sums.append(loss * x.numel())  # no target is masked
    model.train()
    total = sum(torch.stack(sums).tolist())  # waits for the device
    return process.all_reduce(torch.tensor(total, dtype=torch.float64)).item() / n_tokens


def evaluation_batches(n_tokens: int, among: int, length: int, rows: int) -> list[tuple[np.ndarray, int]]:
    """(starts, length) of batches of blocks that lie evenly over `among` tokens and have `n_tokens` together."""
    # Stretched by among / n_tokens, which is at least 1: the blocks lie apart and never overlap.
    starts = np.arange(0, n_tokens, length) * among // n_tokens
    n_full = n_tokens // length
    full = starts[:n_full]
    batches = [(full[i : i + rows], length) for i in range(0, n_full, rows)]
    if rest := n_tokens % length:
        batches.append((starts[n_full:], rest))  # the last block, a shorter one
    return batches


# Starting, saving and resuming


# What becomes of a checkpoint's keys and facts:
#   a key not given   takes its saved value (`follow`), unless it is one of NOT_FOLLOWED
#   a key given       may differ, but not the SHAPE nor, in a resumed run, the optimizer (`check_fits`)
#   a fact            the tokenizer must be the same; in a resumed run also the text and the class of the optimizer
#   init_from         in a resumed run, auto, resume and scratch stand for the saved one; another name must equal it
NOT_FOLLOWED = ("init_from", "out_dir", "eval_only", "device", "compile", "tensorboard")
SHAPE = ["model", *(name for name in MODEL_KEYS if name != "dropout")]
TEXT_FACTS = ("sha256", "train_tokens", "shards")  # what meta.json and ckpt.pt say of the text and its size


@dataclass
class State:
    """The complete state of a run; `step` counts finished optimizer steps. What is written, and when:

    step 0          ckpt.pt; then best.pt of an older run is removed
    evaluation      ckpt.pt before it; after it, if the loss is the lowest, best.pt and ckpt.pt again; a row of log.csv
    report          a row of log.csv
    stop            ckpt.pt

    A kill at any moment costs the time since ckpt.pt was written, and nothing else: a resumed run starts from it and
    repeats what came later, to the same bits on a CPU. The first row that it writes replaces log.csv, without the rows
    that it repeats. Files are written under a temporary name, then renamed; only the last row of log.csv may be torn.
    """

    model: LanguageModel
    optimizer: Any  # with the interface of torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meta: dict  # meta.json of the dataset
    step: int = 0
    best_val_loss: float = math.inf  # of the evaluations after step 0
    best_step: int | None = None

    def save(self, name: str, config: TrainConfig, process: Process) -> None:
        """Process 0 writes ckpt.pt, or best.pt, which has no optimizer: `sample.py` needs none.

        Raises UserError for weights that are not finite.
        """
        if process.rank > 0:
            return
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise diverged("weights are not finite", self.step, config)
        checkpoint = {"format": 1, "model": self.model.state_dict(), "model_config": asdict(self.model.config)}
        checkpoint |= {"step": self.step, "best_val_loss": self.best_val_loss, "best_step": self.best_step}
        checkpoint |= {"config": asdict(config), **{fact: self.meta[fact] for fact in TEXT_FACTS if fact in self.meta}}
        checkpoint["tokenizer"] = {fact: self.meta[fact] for fact in TOKENIZER_FACTS if fact in self.meta}
        if name == "ckpt.pt":
            optimizer = {"class": type(self.optimizer).__name__, "state": self.optimizer.state_dict()["state"]}
            checkpoint |= {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
        with replacing(config.path(name)) as file:
            torch.save(checkpoint, file)
        if self.step == 0:
            config.path("best.pt").unlink(missing_ok=True)

    def keep_if_best(self, val_loss: float, config: TrainConfig, process: Process) -> None:
        """Write best.pt if this validation loss is the lowest. Step 0 does not count: nothing is learned yet."""
        if self.step > 0 and val_loss <= self.best_val_loss:
            self.best_val_loss, self.best_step = val_loss, self.step
            self.save("best.pt", config, process)
            # Again, now that it has the new best: a last step that is no multiple of eval_interval is not evaluated
            # again by a run resumed with a higher max_iters, which would not know of it.
            self.save("ckpt.pt", config, process)

    def restore(self, checkpoint: dict) -> None:
        """Set all but the weights to the checkpoint's. Raises ValueError where it does not fit."""
        # The rest of what torch's optimizers save, rates and decay, stays as the settings say.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
        if checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step = checkpoint["step"]
        self.best_val_loss, self.best_step = checkpoint["best_val_loss"], checkpoint["best_step"]
        if type(self.step) is not int or self.step < 0 or math.isnan(self.best_val_loss):
            raise ValueError(f"step {self.step!r}, best_val_loss {self.best_val_loss!r}")


def start(config: TrainConfig) -> tuple[State, dict[str, Tokens], Process]:
    """The state that the run starts in, its data and processes."""
    source = find_source(config)  # opened by every process, pretrained weights, too
    if source:
        follow(source, config)  # first, for it may set any key: config.dataset, too
    process = join_processes(config)
    config.check(process.world_size)
    if process.rank == 0:
        prepared(config.dataset)  # may download it, while the others wait
    process.barrier()
    meta = load_meta(config.dataset)
    splits = {split: Tokens(config.dataset, split, meta, config.block_size) for split in ("train", "val")}
    torch.manual_seed(config.seed)
    model = source.model if source else MODELS[config.model](config.model_config(meta["vocab_size"]))
    state = new_state(model, meta, config, process)
    if source:
        check_fits(source, state, config)
    if source and source.resuming:
        resume(state, source, config)
    elif source:
        show(f"starting from {source.path}: {', '.join(f'{name} {getattr(config, name)}' for name in SHAPE)}")
    if process.world_size > 1:
        weights = sum(p.double().square().sum().item() for p in state.model.parameters())
        facts = {str(split.path): split.fingerprint() for split in splits.values()}
        facts |= {"step": state.step, "weights": f"{weights:.6g}", "meta.json": meta | {"source": ""}}
        process.refuse_unequal(asdict(config) | facts)
    show(f"{sum(p.numel() for p in state.model.parameters()) / 1e6:.2f}M parameters on {process}")
    warn_of_hours(state, config, process)
    return state, splits, process


@dataclass
class Source:
    """What a run starts from, if not from random weights: out_dir's checkpoint, or pretrained weights."""

    path: Path | str
    resuming: bool  # out_dir's run
    model: LanguageModel
    checkpoint: dict  # what else the file holds; nothing in Hugging Face's format
    keys: dict[str, Any]  # their saved values; of pretrained weights, those of the shape
    facts: dict[str, Any]  # what it says of its tokenizer; of a run also of text and optimizer
    remarks: str = ""  # which keys differ from the saved ones, or follow them


def find_source(config: TrainConfig) -> Source | None:
    """Raises ConfigError if the source does not exist, or if starting without it would overwrite a run."""
    path, best = config.path("ckpt.pt"), config.path("best.pt")
    # After a failure torchrun types the same command again: then "scratch" resumes, too.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if path.exists() and (config.init_from != "scratch" or restarted):
        return open_source(path, True, config)
    if config.init_from == "scratch":
        return None
    if best.exists():
        begin = f"start from it with {flag('init_from', best)} and another --out_dir"
        raise ConfigError(f"there is {best} but no {path}: {begin}, or overwrite it with --init_from=scratch")
    if config.init_from == "resume":
        raise ConfigError(f"there is no {path} to resume; --init_from=scratch starts a new run")
    if config.init_from == "auto":
        return None
    with as_config_error():
        return open_source(checkpoint_in(config.init_from) or config.init_from, False, config)


def open_source(path: Path | str, resuming: bool, config: TrainConfig) -> Source:
    """Raises UserError for a damaged file."""
    quiet_hub(needed=not Path(path).exists())
    with explained(f"cannot open {path}", "; restore a copy, or name another one"):
        model, checkpoint = open_model(path)
        # A shorter context than that of pretrained weights may be asked for.
        if not resuming and isinstance(model, GPT) and "block_size" in config.given:
            model.crop(min(config.block_size, model.config.block_size))
        shape = asdict(model.config) | {"model": type(model).__name__.lower()}
        keys, facts = {name: shape[name] for name in SHAPE}, {"vocab_size": shape["vocab_size"]}
        if checkpoint:  # Hugging Face's format tells nothing else of its tokens
            tokenizer = checkpoint_facts(checkpoint, path)
            facts |= {name: fact for name, fact in tokenizer.items() if name in ("chars", "json")}
        if resuming:
            # A key that is newer than the checkpoint had its default then.
            keys = asdict(TrainConfig()) | checkpoint["config"] | keys
            facts |= {name: checkpoint[name] for name in TEXT_FACTS if name in checkpoint}
            facts["optimizer_class"] = checkpoint.get("optimizer", {}).get("class", "unknown")
    return Source(path, resuming, model, checkpoint, keys, facts)


def follow(source: Source, config: TrainConfig) -> None:
    """Set the keys that were not given to their saved values, checked as if they were typed."""
    if source.resuming and config.init_from in STARTS:
        config.init_from = source.keys["init_from"]
    changed, followed = [], []
    for name in [name for name in TrainConfig.__annotations__ if name in source.keys]:
        before = convert(TrainConfig, name, source.keys[name], f"{source.path}: {name}")
        now = getattr(config, name)
        if before != now and name in config.given:
            changed.append(f"{name} {short(before)} -> {short(now)}")
        elif before != now and name not in NOT_FOLLOWED:
            setattr(config, name, before)
            followed.append(f"{name} {short(before)}")
    remarks = {"changed since": changed, "as in the checkpoint": followed}
    source.remarks = "".join(f"; {remark}: {', '.join(keys)}" for remark, keys in remarks.items() if keys)


def new_state(model: LanguageModel, meta: dict, config: TrainConfig, process: Process) -> State:
    model.config.dropout = config.dropout  # where all parts of the model read it
    model.to(process.device)
    optimizer = Optimizer(model, config, process.dtype)  # torch.optim.AdamW(model.parameters()) would do here, too
    # Small float16 gradients would vanish without a scale; the other dtypes need none.
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    return State(model, optimizer, scaler, meta)


def check_fits(source: Source, state: State, config: TrainConfig) -> None:
    """Raises ConfigError if shape or tokenizer differ; for a run also if optimizer, init_from or text differ.

    A fact that the dataset does not tell cannot differ: nanoGPT's meta.json has no hash of its text.
    """
    fixed = [*SHAPE, "optimizer", "init_from"] if source.resuming else SHAPE
    before = {name: source.keys[name] for name in fixed} | source.facts
    now = asdict(config) | state.meta | {"optimizer_class": type(state.optimizer).__name__}
    different = [name for name, value in before.items() if now.get(name, value) != value]
    if not different:
        return
    if source.resuming:
        advice = f"take another --out_dir, where {flag('init_from', source.path)} fine-tunes these weights"
    else:
        tokens = f"python prepare.py --dataset=NAME --input=FILE {flag('tokenizer', source.path)}"
        advice = f"leave out keys of the shape; {tokens} makes tokens that fit"
    what = ", ".join(f"{name} {short(before[name])} -> {short(now[name])}" for name in different)
    raise ConfigError(f"{source.path} holds another model or text or optimizer than asked for ({what}); {advice}")


def resume(state: State, source: Source, config: TrainConfig) -> None:
    """Set the state to the checkpoint's. Raises UserError where it does not fit."""
    with explained(f"cannot open {source.path}", "; restore a copy, or name another one"):
        state.restore(source.checkpoint)
    if state.step > config.max_iters and not config.eval_only:
        past = f"{source.path} is at step {state.step}, past {flag('max_iters', config.max_iters)}"
        raise ConfigError(f"{past}: raise it, or take another --out_dir")
    show(f"resuming from {source.path} at step {state.step}{source.remarks}")
    # With eval_iters=0, batch_size does not change what is evaluated.
    evaluation = ("eval_iters", "batch_size") if config.eval_iters else ("eval_iters",)
    other_tokens = any(getattr(config, name) != source.keys[name] for name in evaluation)
    if state.best_step and (other_tokens or not config.path("best.pt").exists()):
        state.best_val_loss, state.best_step = math.inf, None
        show("best.pt is gone, or of another evaluation: the lowest loss starts over")


def warn_of_hours(state: State, config: TrainConfig, process: Process) -> None:
    """Warn anyone who types `python train.py` on a laptop, before the first evaluation."""
    flops = flops_of_run(state.model, config) * (1 - state.step / config.max_iters)
    hours = flops / (CPU_FLOPS * torch.get_num_threads() * process.world_size) / 3600
    if hours > 1 and process.device.type == "cpu" and not config.eval_only:
        small = "python train.py config/shakespeare_char_cpu.py takes a minute or two"
        show(f"this takes hours on a CPU, on one like ours about {hours:,.1f}; {small}")


def diverged(what: str, step: int, config: TrainConfig) -> UserError:
    rate = f"learning rate {learning_rate(max(0, step - 1), config):.1e}"
    advice = "Try a lower --learning_rate, a longer --warmup_iters, --grad_clip=1.0 or --dtype=float32"
    return UserError(f"{what} at step {step}, {rate}; the last checkpoint is untouched. {advice}")


# Processes


@dataclass(frozen=True)
class Process:
    """This process among the `world_size` that torchrun started (one, without torchrun), its device and dtype."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    slow_group: dist.ProcessGroup | None = None  # all of them, with a timeout of 7 days

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`; weights, sums and losses stay float32 (Micikevicius et al., 2018).

        The cast cache is off because CUDA graphs do not allow it. It would save nothing: a weight is cast once a pass.
        """
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, cache_enabled=False)

    def all_reduce(self, values: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """The sum over all processes, or what `op` says, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op)
        return values

    def max_over_processes(self, number: int) -> int:
        """The largest over all processes, so that all decide the same. A tensor on the CPU: no GPU is waited for."""
        return int(self.all_reduce(torch.tensor(number), dist.ReduceOp.MAX))

    def refuse_unequal(self, facts: dict[str, Any]) -> None:
        """Raises UserError where a fact differs between processes: they could train, but not the same run."""
        everywhere = [{}] * self.world_size
        dist.all_gather_object(everywhere, facts, self.slow_group)
        unequal = [name for name in facts if any(theirs.get(name) != facts[name] for theirs in everywhere)]
        if unequal:
            advice = "all need the same command and the same files"
            raise UserError(f"not the same in every process: {', '.join(unequal)}; {advice}")

    def barrier(self) -> None:
        """Wait until all are here. A download of 20 GB may take longer than torch's default timeout of 30 minutes."""
        if self.world_size > 1:
            dist.barrier(self.slow_group)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{self.world_size} x {name}, {str(self.dtype).removeprefix('torch.')}"


def join_processes(config: TrainConfig) -> Process:
    """Join the processes that torchrun started. Raises ConfigError for a device or dtype that is not available."""
    rank, world_size = rank_and_size()
    with as_config_error():
        device = choose_device(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses cuBLAS
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        warnings.filterwarnings("ignore", "TensorFloat32")  # torch.compile recommends it; dtype=float32 means none
    with as_config_error():
        dtype = training_dtype(config.dtype, device)  # of the card in use
    if world_size > 1:
        backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=gpu)
        return Process(rank, world_size, device, dtype, dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    return Process(rank, world_size, device, dtype)


def compiled_and_parallel(model: LanguageModel, config: TrainConfig, process: Process) -> Callable:
    """The same weights, for training: kernels fused, or launched together; gradients averaged over the processes.

    Compiled first, or torch.compile would break the graph in DistributedDataParallel's own code. It still splits the
    graph at the bounds of DDP's buckets of gradients, so that they are all-reduced during the backward pass.
    """
    auto = config.compile == "auto" and process.device.type == "cuda"
    compiling = config.compile is True or (auto and flops_of_run(model, config) > COMPILE_FROM)
    try:
        if compiling:
            try_compiler(process.device)
            model = torch.compile(model)
        elif auto and process.world_size == config.gradient_accumulation_steps == 1:
            model = in_cuda_graphs(model, config, process)
    except Exception as error:
        what = "torch.compile" if compiling else "a CUDA graph"
        show(f"{what} does not work here ({type(error).__name__}): training without it")
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if process.world_size > 1 else model


def try_compiler(device: torch.device) -> None:
    """Raises an exception where no compiler works, or wrongly: on a CPU, torch 2.6 loses gradients of embeddings."""
    table = torch.ones(2, 16, device=device, requires_grad=True)
    ids = torch.zeros(64, dtype=torch.int64, device=device)
    torch.compile(lambda ids: nn.functional.embedding(ids, table).sum())(ids).backward()
    if table.grad[0, 0] != len(ids):
        raise ArithmeticError


def in_cuda_graphs(model: LanguageModel, config: TrainConfig, process: Process) -> Callable:
    """Forward and backward pass as CUDA graphs, each launched at once: 300 kernels take longer to launch than to run.

    Each replay overwrites the gradients, so they cannot be accumulated over micro-batches.
    """
    module = nn.Module()  # whose parameters are the model's, and whose output is the loss alone
    module.model = model
    module.forward = lambda x, y: model(x, y, need_logits=False)[1]
    x = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=process.device)
    # torch warns of a wait between streams, which autograd itself arranges.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    with process.autocast():
        loss = torch.cuda.make_graphed_callables(module, (x, x.clone()))
    return lambda x, y, need_logits: (None, loss(x, y))


# The log


class Log:
    """The metrics of a run, for the console, out_dir/log.csv and TensorBoard: a row for each report and evaluation.

    A metric that is new in a row becomes a column, the last one.
    """

    COLUMNS = ("step", "seconds", "loss", "train_loss", "val_loss", "bits_per_byte",
               "lr", "grad_norm", "tokens_per_second", "mfu")  # fmt: skip

    def __init__(self, config: TrainConfig, state: State, process: Process):
        self.config, self.state, self.process = config, state, process
        self.path = config.path("log.csv")
        self.peak_flops = peak_flops(process.device, process.dtype)
        self.rows = self.kept_rows()
        self.columns = list(dict.fromkeys([*self.COLUMNS, *(name for row in self.rows for name in row)]))
        self.written = False  # whether log.csv holds the rows
        self.failed = set()  # what could not be written
        self.start_clock()
        self.started = self.since - max((float(row["seconds"]) for row in self.rows), default=0)
        self.val_loss = math.nan
        self.tensorboard = None
        if config.tensorboard and process.rank == 0 and not config.eval_only:
            from torch.utils.tensorboard import SummaryWriter

            # Older points from purge_step on are dropped. The report of this step is kept; step 0 has none.
            purge_step = state.step + 1 if state.step else 0
            self.tensorboard = SummaryWriter(config.out_dir, purge_step=purge_step)

    def kept_rows(self) -> list[dict[str, object]]:
        """The rows of log.csv to keep: those up to this step, except an evaluation that is about to be repeated."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        due, rows = evaluation_due(self.state.step, self.config), []
        for line in lines[1:]:
            with suppress(ValueError, KeyError):  # leaves out a damaged row
                row = dict(zip(lines[0].split(","), line.split(","), strict=True))
                step, seconds = int(row["step"]), float(row["seconds"])
                repeated = step > self.state.step or (step == self.state.step and due and row["val_loss"])
                if seconds >= 0 and not repeated:
                    rows.append(row)
        return rows

    def start_clock(self) -> None:
        """Speed is measured from here on."""
        self.since = time.perf_counter()
        self.since_step = self.state.step

    def seconds(self) -> float:
        """Of the whole run: this start, and the earlier ones up to their last row in log.csv."""
        return time.perf_counter() - self.started

    def cost(self) -> str:
        on_gpu = self.process.device.type == "cuda"
        memory = f" and at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory" if on_gpu else ""
        return f"{self.seconds():.0f} s{memory}"

    def report(self, metrics: dict[str, Tensor]) -> None:
        """The metrics of the last step, and the mean speed since the last report or evaluation. Waits for the device.

        Raises UserError where loss or gradient norm are not finite.
        """
        state, config = self.state, self.config
        means = self.process.all_reduce(torch.stack(list(metrics.values()))) / self.process.world_size
        metrics = dict(zip(metrics, means.tolist(), strict=True))
        self.check_finite(metrics["loss"], metrics["grad_norm"])
        seconds = (time.perf_counter() - self.since) / (state.step - self.since_step)  # of a step
        speed = config.batch_size * config.block_size / seconds
        metrics |= {"lr": learning_rate(state.step - 1, config), "tokens_per_second": speed}
        if self.peak_flops:
            metrics["mfu"] = state.model.flops_per_token() * speed / (self.peak_flops * self.process.world_size)
        self.write(metrics)
        self.show_report(metrics, eta=(config.max_iters - state.step) * seconds)
        self.start_clock()

    def check_finite(self, loss: float, grad_norm: float) -> None:
        scale, in_float16 = self.state.scaler.get_scale(), self.state.scaler.is_enabled()
        # In float16 the scaler skips a step whose gradients overflow, and halves the scale. Below 1 it is of no use.
        overflows = scale < 1 if in_float16 else not math.isfinite(grad_norm)
        if overflows or not math.isfinite(loss):
            scaled = f" with the loss scaled by {scale}" if scale < 1 else ""
            raise diverged(f"loss is {loss}, gradient norm {grad_norm}{scaled}", self.state.step, self.config)

    def show_report(self, metrics: dict[str, float], eta: float) -> None:
        line = [f"step {self.state.step}/{self.config.max_iters}", f"loss {metrics['loss']:.2f}"]
        line += [f"lr {metrics['lr']:.1e}", f"grad {metrics['grad_norm']:.2f}"]
        thousands = metrics["tokens_per_second"] / 1e3
        line.append(f"{thousands:,.0f}k tok/s" if thousands >= 10 else f"{thousands:.1f}k tok/s")
        if "mfu" in metrics:
            line.append(f"mfu {metrics['mfu']:.0%}")
        line.append(f"eta {timedelta(seconds=round(eta))}")
        progress.show(" | ".join(line))

    def evaluation(self, metrics: dict[str, float]) -> None:
        """The metrics of an evaluation, whose time does not count as training."""
        self.val_loss = metrics["val_loss"]
        self.write(metrics)
        self.show_evaluation(metrics)
        self.start_clock()

    def show_evaluation(self, metrics: dict[str, float]) -> None:
        line = f"step {self.state.step}: train loss {metrics['train_loss']:.4f}, val loss {metrics['val_loss']:.4f}"
        if "bits_per_byte" in metrics:
            line += f", {metrics['bits_per_byte']:.2f} bits per byte"
        show(line)

    def write(self, metrics: dict[str, float]) -> None:
        """Process 0 adds the metrics of this step to the log."""
        if self.process.rank > 0:
            return
        for write in (self.add_row, self.add_points):
            try:
                write(metrics)
            except OSError as error:  # a full disk, or a file that is open in another program, must not end the run
                if write not in self.failed:
                    show(f"cannot write the log ({error}): the run goes on")
                self.failed.add(write)

    def add_row(self, metrics: dict[str, float]) -> None:
        """Append a row to log.csv, or write it anew: at a start, for a new metric, and after a failure."""
        row = {"step": self.state.step, "seconds": round(self.seconds(), 3)}
        row |= {name: f"{value:.7g}" for name, value in metrics.items()}
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        appending = self.written and not new
        self.written = False  # if the write below fails, the next row writes the whole file anew
        if appending:
            with open(self.path, "a") as file:
                file.write(self.line(row))
        else:
            self.columns += new
            header = {name: name for name in self.columns}
            with replacing(self.path) as file:
                file.write("".join(map(self.line, (header, *self.rows))).encode())
        self.written = True

    def add_points(self, metrics: dict[str, float]) -> None:
        """Add a point to TensorBoard's curve of each metric."""
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, self.state.step)
            self.tensorboard.flush()

    def line(self, row: dict[str, object]) -> str:
        return ",".join(str(row.get(name, "")) for name in self.columns) + "\n"


def flops_of_run(model: LanguageModel, config: TrainConfig) -> int:
    return model.flops_per_token() * config.batch_size * config.block_size * config.max_iters


if __name__ == "__main__":
    run(main)
