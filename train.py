"""Train a GPT. Read `main` for the run from start to end, `train_step` for one step.

One idea: step k of a run is a pure function of (weights, optimizer state, config, data, k). Its batch is drawn from
(seed, k), its dropout from (seed, k, rank, micro-batch), and each evaluation of a run reads the same blocks. So a
killed run resumes from its last checkpoint (bit for bit on a CPU), and one process and eight see the same batches.

    python train.py                                          the reference model on Tiny Shakespeare
    python train.py config/shakespeare_char_cpu.py           a small one, a minute or two on a laptop
    torchrun --nproc_per_node=8 train.py --n_layer=12        many GPUs, other values
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Ctrl-C during the imports shows no traceback
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

import math
import os
import re
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw

from config import ConfigError, StopSignals, UserError, explained, key, progress, rank_and_size, read, run, show, typed
from model import GPT, MODELS, GPTConfig, LanguageModel
from prepare import Tokens, dataset_folder, first_token, locked, prepared, replacing, tokenizer_of
from sample import TOKENIZER_FACTS, checkpoint_in, choose_device, choose_dtype, open_model, shapes_and_types, usable

STARTS = ("auto", "scratch", "resume")  # init_from is one of these or names pretrained weights
SHAPE = ("model", "n_layer", "n_head", "n_embd", "block_size", "bias", "feed_forward", "residual", "layer_norm")
RATES = ("learning_rate", "min_lr", "weight_decay")  # chosen for an optimizer, so that they stay with it
TEXT_FACTS = ("sha256", "train_tokens", "shards")  # of meta.json and a checkpoint: which text, how much of it
OTHER_NAMES = {  # keys of nanoGPT and others, and what there is here
    "epochs": "--max_iters counts steps; an epoch is train_tokens / (batch_size * block_size) of them",
    "resume": "the same command typed again resumes",
    "gpu": "--device=cuda; without it a GPU is taken where torch finds one",
    "lr": "it is --learning_rate",
    "shards": "python prepare.py --dataset=fineweb --shards=N, before",
    **dict.fromkeys(("wandb_log", "wandb_project", "wandb_run_name"), "--tensorboard=True draws curves"),
    "always_save_checkpoint": "every evaluation writes ckpt.pt",
    "backend": "it is nccl on GPUs, gloo on CPUs",
}
# FLOPs of a whole run from which torch.compile pays back. On an H100 it takes 18.5 s at first, and saves 2.5 of the
# 8.2 ms in which the GPU computes a step of 1.2e12 FLOPs (64 x 256 tokens of the reference model; torch 2.11).
COMPILE_FROM = 1e16
# FLOP/s of each thread in training: 2 threads took 1.3 hours for the 1.2e15 of the reference recipe on an AMD EPYC
# (family 26), 2 hours on an Intel Xeon with AMX (torch 2.13).
CPU_FLOPS = 1e11
# Dense bfloat16 FLOP/s, from the makers' data sheets: of cards whose names match the pattern; the first match counts.
PEAK_FLOPS = {
    "A100": 312e12, "A10$": 125e12, "L4$": 121e12, "L40S": 362e12, "RTX 4090$": 165e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100 80GB HBM3": 989e12, "H200 NVL": 835e12, "H200": 989e12, r"\bB200": 2250e12,
    "GB200": 2500e12, "MI300X": 1307e12,
}  # fmt: skip


@dataclass
class TrainConfig:
    """Train a GPT. The same command typed again resumes where the last one stopped."""

    given = frozenset()  # the keys that a recipe or the command sets, filled in by config.read
    other_names = OTHER_NAMES

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
    learning_rate: float = key(8e-3, "peak learning rate", least=0)
    min_lr: float = key(0.0, "learning rate at the end of the decay", least=0)
    warmup_iters: int = key(50, "steps of linear warm-up", least=0)
    lr_decay_iters: int | None = key(None, "step at which the decay ends; None: max_iters", least=1)
    decay_lr: bool = key(True, "cosine decay after the warm-up; False: stay at the peak")
    max_iters: int = key(2000, "optimizer steps", least=1)
    weight_decay: float = key(1.5, "weight decay, on matrices only", least=0)
    beta1: float = key(0.9, "AdamW's decay rate for the mean of the gradients", least=0, below=1)
    beta2: float = key(0.99, "AdamW's decay rate for the mean of their squares", least=0, below=1)
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", least=0)

    eval_interval: int = key(250, "steps between evaluations, each of which writes a checkpoint", "evaluation", least=1)
    eval_iters: int = key(0, "batches of each evaluation; 0: the whole validation split", least=0)
    eval_only: bool = key(False, "evaluate once and end, writing nothing")
    log_interval: int = key(10, "steps between rows of log.csv", least=1)

    seed: int = key(1337, "of initial weights, batches and dropout", "machine", least=0, below=2**63)
    device: str = key("auto", "cuda, cuda:N, mps or cpu; auto: the first that is available")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "of matrix products; auto: the fastest safe one; float32: without TF32"
    )
    compile: Literal["auto"] | bool = key("auto", "torch.compile; auto: on cuda, for long runs, else CUDA graphs")
    deterministic: bool = key(False, "repeat a run bit for bit on cuda, too; slower")
    tensorboard: bool = key(False, "also write curves and samples for TensorBoard to out_dir")

    def __post_init__(self):
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above learning_rate ({self.learning_rate})")
        if not self.out_dir:
            raise ValueError("out_dir is empty: it must name a folder")
        dataset_folder(self.dataset)
        self.model_config(vocab_size=1)
        if self.init_from not in STARTS:
            self.init_from = os.path.normpath(self.init_from)
            if not self.path("ckpt.pt").exists():  # a resumed run does not need its pretrained weights
                checkpoint_in(self.init_from, STARTS)

    def path(self, name: str) -> Path:
        return Path(self.out_dir) / name

    def model_config(self, vocab_size: int) -> GPTConfig:
        shared = {field.name for field in fields(self)} & {field.name for field in fields(GPTConfig)}
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in shared})

    def micro_batch_size(self, world_size: int) -> int:
        """Sequences that one process reads at a time. Raises ConfigError when the batch cannot be divided."""
        rows, rest = divmod(self.batch_size, world_size * self.gradient_accumulation_steps)
        if rest:
            shares = f"processes ({world_size}) x gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            raise ConfigError(f"batch_size ({self.batch_size}) must be divisible by the number of {shares}")
        return rows


def main(argv: list[str]) -> int | None:
    """Train; returns the exit status of a run that a signal stopped."""
    config = read(TrainConfig, argv)
    scratch = config.init_from == "scratch"  # typed now; a resumed run gets what it began with
    process = join_processes(config)
    meta = process.on_rank_0(prepared, config.dataset)
    with ExitStack() as until_the_end:
        if not config.eval_only:
            process.on_rank_0(lambda: until_the_end.enter_context(locked(config.path("lock"))))
        state = initial_state(config, meta, process)
        splits = {split: Tokens(config.dataset, split, meta, config.block_size) for split in ("train", "val")}
        log = Log(config, state, process)
        if config.eval_only:
            return log.show(evaluate(state, splits, config, process))
        model = compiled_and_parallel(state.model, config, process)
        if process.rank == 0:
            if state.step == 0:  # first: whenever a kill comes, the next start sees step 0 and does the rest
                state.save("ckpt.pt", config)
            log.begin()
            if state.best_val_loss == math.inf:  # best.pt is another run's
                config.path("best.pt").unlink(missing_ok=True)
        update_best(state, splits["val"], config, process)
        signals = until_the_end.enter_context(StopSignals())
        pending = []  # loss and gradient norm of each step since the last report, on the device: no step waits for it
        while True:
            stop, showing = process.max_over_processes(signals.received, progress.due())
            last = state.step >= config.max_iters
            evaluation_due = last or state.step % config.eval_interval == 0
            evaluating = evaluation_due and not stop
            logging = evaluation_due or state.step % config.log_interval == 0 or state.step == 1
            if logging or showing or stop:
                # Raises where a loss is not finite, before anything is written.
                metrics = log.measure(*checked(pending, state, config, process)) if pending else {}
                # In this order: what a kill leaves out, the resumed run does.
                if metrics and process.rank == 0:
                    if logging:
                        log.write(metrics)
                    if evaluation_due or stop:  # before the evaluation: who stops a run may not wait for its end
                        state.save("ckpt.pt", config)
                if evaluating:
                    losses = evaluate(state, splits, config, process)
                    metrics |= losses
                    if process.rank == 0:
                        log.write(losses)
                        if losses["val_loss"] == state.best_val_loss:
                            state.save("ckpt.pt", config)
                            state.save("best.pt", config)
                log.show(metrics)
                if evaluating and last:
                    break
                # A signal may have come during the evaluation. And after a stop, all wait for process 0, for torchrun
                # ends the others as soon as one has left.
                if evaluating or stop:
                    stop = process.max_over_processes(signals.received)[0]
                if stop:
                    break
                pending.clear()
                log.start_clock()  # evaluating and saving are not training
            pending.append(train_step(model, state, splits["train"], config, process))
            state.step += 1
    if stop:
        again = "the same command without --init_from" if scratch else "the same command"
        show(f"stopped by {signal.Signals(stop).name} after step {state.step}; {again} resumes from there")
        return 128 + stop
    best = f"best validation loss {state.best_val_loss:.4f} at step {state.best_step}"
    show(f"{best}, after {log.cost()}; try python sample.py {typed('out_dir', config.out_dir)}")


def train_step(model: nn.Module, state: State, tokens: Tokens, config: TrainConfig, process: Process) -> Tensor:
    """One step down the gradient of batch `state.step`. Returns (loss, gradient norm), still on the device."""
    state.optimizer.lr = learning_rate(state.step, config)
    micro_steps = config.gradient_accumulation_steps
    total_loss = torch.zeros((), device=process.device)
    for micro_step in range(micro_steps):
        x, y = batch(tokens, state.step, micro_step, config, process)
        seeds = np.random.SeedSequence((config.seed, state.step, process.rank, micro_step))  # of dropout
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
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
    state.model.zero_grad(set_to_none=process.world_size == 1)  # DDP's gradients must stay views of its buckets
    return torch.stack((total_loss, grad_norm))


def checked(pending: list[Tensor], state: State, config: TrainConfig, process: Process) -> tuple[float, float]:
    """Loss and gradient norm of the last step, over all processes. Raises UserError if any step's is not finite."""
    rows = (process.all_reduce(torch.stack(pending)) / process.world_size).tolist()  # waits for the device
    for step, (loss, grad_norm) in enumerate(rows, state.step - len(rows) + 1):
        # A float16 gradient may overflow: the scaler skips that step and halves its scale.
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or state.scaler.is_enabled()):
            raise diverged(f"loss is {loss}, gradient norm {grad_norm}", step, config)
    if (scale := state.scaler.get_scale()) < 1:
        raise diverged(f"gradient norm is {grad_norm}, even with the loss scaled by {scale}", state.step, config)
    return loss, grad_norm


def diverged(what: str, step: int, config: TrainConfig) -> UserError:
    return UserError(
        f"{what} at step {step}, learning rate {learning_rate(max(0, step - 1), config):.1e}; the last checkpoint is "
        "untouched. Try a lower --learning_rate, a longer --warmup_iters, --grad_clip=1.0 or --dtype=float32"
    )


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

    Every process draws the starts of the whole batch and takes its own: the batch is the same, however many share it.
    """
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(len(tokens) - config.block_size, size=config.batch_size)
    rows = config.micro_batch_size(process.world_size)
    offset = (process.rank * config.gradient_accumulation_steps + micro_step) * rows
    return inputs_and_targets(tokens, starts[offset : offset + rows], config.block_size, process.device)


def inputs_and_targets(tokens: Tokens, starts: np.ndarray, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks (B, length) from each of `starts` (B,) on, and, shifted by one, the next token at each position."""
    rows = torch.from_numpy(tokens.blocks(starts, length))  # (B, length + 1)
    if device.type == "cuda":
        rows = rows.pin_memory()  # so that the copy is asynchronous
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


# Evaluation


def evaluate(state: State, splits: dict[str, Tokens], config: TrainConfig, process: Process) -> dict[str, float]:
    """The mean losses of both splits. `state` keeps the lowest validation loss after step 0.

    Raises UserError for a validation loss that is not finite.
    """
    n_tokens = evaluated_tokens(splits["val"], config)
    train_loss, val_loss = (mean_loss(state.model, split, n_tokens, config, process) for split in splits.values())
    if not math.isfinite(val_loss):
        raise diverged(f"validation loss is {val_loss}", state.step, config)
    if state.step > 0 and val_loss <= state.best_val_loss:
        state.best_val_loss, state.best_step = val_loss, state.step
    metrics = {"train_loss": train_loss, "val_loss": val_loss}
    if splits["val"].n_bytes and n_tokens == len(splits["val"]) - 1:  # the whole split, whose bytes are known
        metrics["bits_per_byte"] = val_loss / math.log(2) * len(splits["val"]) / splits["val"].n_bytes
    return metrics


def evaluated_tokens(tokens: Tokens, config: TrainConfig) -> int:
    """How many tokens of a split an evaluation predicts: those of the first `eval_iters` batches, or all."""
    n_tokens = config.eval_iters * config.batch_size * config.block_size
    return min(n_tokens or len(tokens), len(tokens) - 1)


@torch.no_grad()
def mean_loss(model: LanguageModel, tokens: Tokens, n_tokens: int, config: TrainConfig, process: Process) -> float:
    """Mean loss, in nats a token, of predicting tokens 1 to `n_tokens` of a split (0 is given), block after block.

    The processes share the blocks. The model is the uncompiled one: these batches differ in shape from training's.
    """
    n_tokens = min(n_tokens, len(tokens) - 1)
    length = config.block_size
    at_once = 2**16 if process.device.type == "cuda" else 2**13  # tokens that fill the device, however short the blocks
    rows = max(config.micro_batch_size(process.world_size), at_once // length)
    starts = np.arange(0, n_tokens - length + 1, length)
    groups = [(starts[i : i + rows], length) for i in range(0, len(starts), rows)]
    if rest := n_tokens % length:
        groups.append((np.array([n_tokens - rest]), rest))
    model.eval()
    losses = [torch.zeros((), device=process.device)]  # a process may have no group
    for at, (group, length) in enumerate(groups[process.rank :: process.world_size]):
        progress.show(f"evaluating {tokens.path}: {at * process.world_size / len(groups):.0%}")
        with process.autocast():
            _, loss = model(*inputs_and_targets(tokens, group, length, process.device), need_logits=False)
        losses.append(loss * (len(group) * length))
    model.train()
    total = sum(torch.stack(losses).tolist())  # waits for the device
    return process.all_reduce(torch.tensor(total, dtype=torch.float64)).item() / n_tokens


def update_best(state: State, tokens: Tokens, config: TrainConfig, process: Process) -> None:
    """Evaluate best.pt once more if its loss was measured on another number of validation tokens than is read now.

    One that is gone or damaged, or does not fit the run, is forgotten.
    """
    path, before, state.best_tokens = config.path("best.pt"), state.best_tokens, evaluated_tokens(tokens, config)
    exists = process.on_rank_0(path.exists)
    if exists and before == state.best_tokens:
        return
    state.best_val_loss, state.best_step = math.inf, None
    if exists:
        with suppress(UserError):  # of a damaged file
            model, best = open_model(path, config.dropout)
            if model.config == state.model.config:
                loss = mean_loss(model.to(process.device), tokens, state.best_tokens, config, process)
                show(f"{path}: val loss {loss:.4f} on the {state.best_tokens:,} tokens that are evaluated now")
                if loss < math.inf:
                    state.best_val_loss, state.best_step = loss, best["step"]


# State and checkpoints


@dataclass
class State:
    """All that a run is at one moment; `step` counts finished optimizer steps."""

    model: LanguageModel
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    meta: dict  # meta.json of the dataset
    step: int = 0
    best_val_loss: float = math.inf  # of the evaluations after step 0
    best_step: int | None = None
    best_tokens: int | None = None  # how many validation tokens best_val_loss was measured on

    def save(self, name: str, config: TrainConfig) -> None:
        """Write best.pt, what `sample.py` needs, or ckpt.pt, with the optimizer, to out_dir.

        Weights that are not finite are not saved: the evaluation that follows stops the run.
        """
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            return
        checkpoint = {"format": 1, "model": self.model.state_dict(), "model_config": asdict(self.model.config)}
        checkpoint |= {name: getattr(self, name) for name in ("step", "best_val_loss", "best_step", "best_tokens")}
        checkpoint |= {"config": asdict(config), **{fact: self.meta[fact] for fact in TEXT_FACTS if fact in self.meta}}
        checkpoint["tokenizer"] = {fact: self.meta[fact] for fact in TOKENIZER_FACTS if fact in self.meta}
        if name == "ckpt.pt":
            checkpoint |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        with replacing(config.path(name)) as file:
            torch.save(checkpoint, file)

    def restore(self, checkpoint: dict) -> None:
        """Set optimizer, scaler and step to the checkpoint's. Raises ValueError where they do not fit the weights."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler := checkpoint["scaler"]:
            if shapes_and_types(scaler) != shapes_and_types(torch.amp.GradScaler("cpu").state_dict()):
                raise ValueError(f"its scaler is {short(scaler)}")
            self.scaler.load_state_dict(scaler)
        for name in ("step", "best_val_loss", "best_step", "best_tokens"):
            if not isinstance(number := checkpoint[name], float if name == "best_val_loss" else int | None):
                raise ValueError(f"its {name} is {short(number)}")
            setattr(self, name, number)


def initial_state(config: TrainConfig, meta: dict, process: Process) -> State:
    """What the run starts from: out_dir/ckpt.pt, pretrained weights or nothing. `config` adopts their shape."""
    path = config.path("ckpt.pt")
    source = starting_point(config, path)
    model, checkpoint = open_model(source, config.dropout) if source else (None, {})
    step = checkpoint.get("step")
    if process.on_rank_0(lambda: step) != step:
        raise UserError(f"{path} is not the same on every machine: all must see the same folder")
    if model:
        if isinstance(model, GPT) and source != path and "block_size" in config.given:
            model.crop(min(config.block_size, model.config.block_size))
        with usable(source):
            if source == path and "moments" not in checkpoint.get("optimizer", {}):
                advice = f"use {typed('init_from', path)} and another --out_dir"
                raise ConfigError(f"{path} has no optimizer state that fits: {advice}")
            adopt_shape(config, meta, model, checkpoint, source)
    else:
        torch.manual_seed(config.seed)
        model = MODELS[config.model](config.model_config(meta["vocab_size"]))
    model.to(process.device)
    # Small float16 gradients would vanish without a scale; the other dtypes need none.
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    state = State(model, Optimizer(model, config, process.dtype), scaler, meta)
    if source == path:
        with usable(path):
            state.restore(checkpoint)
        changed = ", ".join(changes(checkpoint["config"], asdict(config)).values())
        show(f"resuming from {path} at step {state.step}" + (f"; changed since: {changed}" if changed else ""))
    elif source:
        show(f"starting from {source}: {', '.join(f'{name} {getattr(config, name)}' for name in SHAPE)}")
    elif config.eval_only:
        show(f"random weights are evaluated, not {path}")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    show(f"{n_parameters / 1e6:.2f}M parameters on {process}")
    if config.warmup_iters >= config.max_iters and not config.eval_only:
        numbers = f"warmup_iters ({config.warmup_iters}) is not below max_iters ({config.max_iters})"
        show(f"{numbers}: the learning rate rises until the end and never decays")
    if state.step >= config.max_iters and not config.eval_only:
        show(f"max_iters ({config.max_iters}) is reached: raise it, or take another --out_dir")
    left = 1 - state.step / config.max_iters
    hours = left * flops_of_run(model, config) / (CPU_FLOPS * torch.get_num_threads() * process.world_size * 3600)
    if hours > 1 and process.device.type == "cpu" and not config.eval_only:
        small = "python train.py config/shakespeare_char_cpu.py takes a minute or two"
        show(f"this takes hours on a CPU, on one like ours about {hours:,.1f}; {small}")
    return state


def starting_point(config: TrainConfig, path: Path) -> Path | str | None:
    """The checkpoint `path` to resume, pretrained weights, or None. Raises ConfigError rather than overwrite a run."""
    best = path.with_name("best.pt")
    if config.init_from == "scratch":
        if path.exists() and was_restarted():
            raise ConfigError(f"--init_from=scratch would overwrite {path}; without it, the run resumes")
        return None
    if path.exists():
        return path
    if best.exists():
        start = f"start from it with {typed('init_from', best)} and another --out_dir"
        raise ConfigError(f"there is {best} but no {path}: {start}, or overwrite it with --init_from=scratch")
    if config.init_from == "resume":
        raise ConfigError(f"there is no {path} to resume; --init_from=scratch starts a new run")
    return None if config.init_from in STARTS else config.init_from


def adopt_shape(config: TrainConfig, meta: dict, model: LanguageModel, checkpoint: dict, source: Path | str) -> None:
    """Put the shape of the weights into `config`; when resuming, also init_from, the optimizer and what belongs to it.

    Raises ConfigError where a key that was given contradicts them, or where the dataset has another tokenizer or text.
    """
    resuming = source == config.path("ckpt.pt")
    adopted = (*SHAPE, "optimizer", "init_from") if resuming else SHAPE
    asked = config.given - ({"init_from"} if config.init_from in STARTS else set())
    found = {**checkpoint.get("tokenizer", {}), **checkpoint.get("config", {}), **asdict(model.config)}
    found |= {"model": type(model).__name__.lower()} | {name: checkpoint.get(name) for name in TEXT_FACTS if resuming}
    wanted = {name: getattr(config, name) for name in adopted if name in asked}
    facts = ("vocab_size", "chars", "json", *TEXT_FACTS)
    wanted |= {name: meta[name] for name in facts if name in meta and found.get(name)}
    if different := changes(found, wanted):
        advice = "; use another --out_dir, or overwrite this run with --init_from=scratch"
        if not resuming and different.keys() & {"vocab_size", "chars", "json"}:
            tokens = f"{typed('dataset', config.dataset)} --input=FILE {typed('tokenizer', source)}"
            advice = f"; prepare the text in its tokens: python prepare.py {tokens}"
        elif not resuming:
            advice = f"; these weights have a shape: leave out {' '.join(f'--{name}' for name in different)}"
        elif different.keys() == {"init_from"}:
            advice = "; use another --out_dir, or leave out --init_from to resume this run"
        elif different.keys() == {"optimizer"}:
            own = (typed(name, found[name]) for name in ("optimizer", *RATES) if found[name] != getattr(config, name))
            advice = f"; use another --out_dir, or resume this run with {' '.join(own)}"
        elif different.keys() <= {*TEXT_FACTS}:
            advice = f"; use another --out_dir, where {typed('init_from', source)} fine-tunes these weights"
            if "shards" in different:
                way = f"python prepare.py {typed('dataset', config.dataset)} {typed('shards', found['shards'])}"
                advice += f", or take its shards again: {way}"
        what = f"another model or text or optimizer than asked for ({', '.join(different.values())})"
        raise ConfigError(f"{source} holds {what}{advice}")
    for name in (*adopted, *(name for name in RATES if resuming and name not in config.given)):
        setattr(config, name, type(getattr(config, name))(found[name]))


def changes(old: dict, new: dict) -> dict[str, str]:
    """What differs of what both have, in few words, by name: {"dropout": "dropout 0.1 -> 0.2"}."""
    different = {name: value for name, value in new.items() if name in old and repr(old[name]) != repr(value)}
    return {name: f"{name} {short(old[name])} -> {short(value)}" for name, value in different.items()}


class Optimizer:
    """AdamW (Loshchilov & Hutter, 2019), with weight decay on matrices only, not on gains and biases.

    optimizer="muon": the matrices inside the blocks step along their momentum made orthogonal (Jordan et al., 2024): no
    direction dominates then. Its size is that of AdamW's step (Liu et al., 2025); yet the best rates are higher here.

    Of torch.optim this calls a function, for its classes import torch.compile's machinery, which took 4.6 of the 13.3
    seconds before the first step of the reference run on an H100 (torch 2.11).
    """

    def __init__(self, model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32):
        self.config, self.dtype = config, torch.float32 if dtype == torch.float16 else dtype  # float16 underflows
        self.lr = 0.0
        # For torch's GradScaler. Fused AdamW skips a float16 step that overflows by itself; for Muon the scaler waits.
        self._step_supports_amp_scaling = config.optimizer == "adamw"
        alike = defaultdict(list)  # parameters that take one step together
        for name, p in model.named_parameters():
            by_muon = config.optimizer == "muon" and p.dim() == 2 and ".h." in name
            alike[by_muon, p.shape if by_muon else p.dim() == 2].append(p)
        self.param_groups = []
        for (by_muon, _), params in alike.items():
            if by_muon:  # the means of the gradients (n, rows, columns)
                moments = [torch.zeros_like(torch.stack(params))]
            else:  # numbers of steps (n,), then the means of the gradients and those of their squares
                steps = torch.zeros(len(params), device=params[0].device)
                moments = [steps, *(torch.zeros_like(p) for p in params * 2)]
            decay = config.weight_decay if params[0].dim() == 2 else 0.0
            self.param_groups.append({"params": params, "moments": moments, "weight_decay": decay, "by_muon": by_muon})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            step = self.muon if group["by_muon"] else self.adamw
            step(group["params"], group["moments"], group["weight_decay"])

    def adamw(self, params: list[Tensor], moments: list[Tensor], weight_decay: float) -> None:
        (steps, *means), n = moments, len(params)
        tensors = (params, [p.grad for p in params], means[:n], means[n:], [], [*steps.unbind()])
        betas = {"beta1": self.config.beta1, "beta2": self.config.beta2}
        settings = {"lr": self.lr, "weight_decay": weight_decay, "eps": 1e-8, "amsgrad": False, "maximize": False}
        adamw(*tensors, fused=True, found_inf=getattr(self, "found_inf", None), **betas, **settings)

    def muon(self, params: list[Tensor], moments: list[Tensor], weight_decay: float) -> None:
        gradients, (momentum,) = torch.stack([p.grad for p in params]), moments  # (n, rows, columns): all at once
        momentum.lerp_(gradients, 1 - 0.95)
        directions = orthogonal(gradients.lerp(momentum, 0.95).to(self.dtype))  # Nesterov's: one step ahead
        for p, direction in zip(params, directions, strict=True):
            p.mul_(1 - self.lr * weight_decay).add_(direction, alpha=-0.2 * math.sqrt(max(p.shape)) * self.lr)

    def state_dict(self) -> dict:
        return {"moments": [group["moments"] for group in self.param_groups]}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for a state of other parameters, or of another optimizer."""
        if shapes_and_types(state) != shapes_and_types(self.state_dict()):
            raise ValueError("its optimizer state does not fit its weights")
        for group, saved in zip(self.param_groups, state["moments"], strict=True):
            for moment, value in zip(group["moments"], saved, strict=True):
                moment.copy_(value)


def orthogonal(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) of the same directions, singular values all about 1, by five Newton-Schulz steps."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):  # x = 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


# Processes and devices


@dataclass(frozen=True)
class Process:
    """This process among the `world_size` that torchrun started (one, without torchrun), its device and dtype."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`; weights, sums and losses stay float32 (Micikevicius et al., 2018).

        Without its cache, which CUDA graphs refuse: no weight is cast twice in a pass.
        """
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, cache_enabled=False)

    def all_reduce(self, values: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """The sum over all processes, or what `op` says, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op)
        return values

    def max_over_processes(self, *numbers: int) -> list[int]:
        """The largest of each over all processes, so that they decide alike; between CPUs: no GPU is waited for."""
        return self.all_reduce(torch.tensor(numbers), dist.ReduceOp.MAX).tolist()

    def on_rank_0(self, make: Callable[..., Any], *arguments: object) -> Any:
        """Call `make` in process 0, while the others wait; all of them return its result or raise its error."""
        made = [None]
        if self.rank == 0:
            try:
                made = [make(*arguments)]
            except (UserError, OSError) as error:
                made = [error]
        if self.world_size > 1:
            # To download 20 GB takes longer than the half hour after which torch takes a process for lost.
            dist.broadcast_object_list(made, group=dist.new_group(backend="gloo", timeout=timedelta(days=7)))
        if isinstance(made[0], Exception):
            raise made[0] if self.rank == 0 or isinstance(made[0], UserError) else UserError(str(made[0]))
        return made[0]

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{self.world_size} x {name}, {str(self.dtype).removeprefix('torch.')}"


def join_processes(config: TrainConfig) -> Process:
    """Join the processes that torchrun started. Raises ConfigError for a batch size or device that does not fit."""
    rank, world_size = rank_and_size()
    config.micro_batch_size(world_size)
    device = choose_device(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses cuBLAS
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        warnings.filterwarnings("ignore", "TensorFloat32")  # torch.compile advises it: here float32 is float32
    dtype = training_dtype(config.dtype, device)
    if world_size > 1:
        place = {}
        if os.environ.get("GROUP_WORLD_SIZE") == "1" and was_restarted():
            # torchrun's store still holds the addresses of the dead processes (pytorch issue 135712).
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            place = {"store": store, "rank": rank, "world_size": world_size}
        backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=gpu, **place)
    return Process(rank, world_size, device, dtype)


def was_restarted() -> bool:
    """Whether torchrun has started this process again after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype `name`, or the fastest that is safe on the device. Raises ConfigError for an unsafe one."""
    if name == "float16" and device.type != "cuda":
        raise ConfigError(f"float16 needs the loss scaling of a cuda device, found {device}; use bfloat16 or float32")
    # bfloat16 is faster with AMX, and with AVX-512's instructions for it on an AMD EPYC. On an Intel Xeon (family 6,
    # model 207) without its AMX, a step of the small recipe takes 1.6 times as long as in float32.
    cpu = torch.cpu.get_capabilities()
    fast = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", ""))
    return torch.bfloat16 if name == "auto" and device.type == "cpu" and fast else choose_dtype(name, device)


def compiled_and_parallel(model: LanguageModel, config: TrainConfig, process: Process) -> Callable:
    """The same weights, for training: kernels fused, or launched together; gradients averaged over the processes.

    Compiled first, or torch.compile would break the graph in DistributedDataParallel's own code. It still splits the
    graph at the bounds of DDP's buckets of gradients, so that they are all-reduced during the backward pass.
    """
    auto = config.compile == "auto" and process.device.type == "cuda"
    compiling = config.compile is True or (auto and flops_of_run(model, config) > COMPILE_FROM)
    try:
        if compiling:
            torch.compile(torch.exp)(torch.ones(1, device=process.device))  # is there a compiler that works?
            model = torch.compile(model)
        elif auto and process.world_size == config.gradient_accumulation_steps == 1:
            model = recorded(model, config, process)
    except Exception as error:
        what = "torch.compile" if compiling else "a CUDA graph"
        show(f"{what} does not work here ({type(error).__name__}): training without it")
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if process.world_size > 1 else model


def recorded(model: LanguageModel, config: TrainConfig, process: Process) -> Callable:
    """Forward and backward pass as CUDA graphs, each launched at once: 300 kernels take longer to launch than to run.

    For one micro-batch a step: the gradients are where the next replay writes.
    """

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.model(x, y, need_logits=False)[1]

    x = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64, device=process.device)
    # torch warns of a wait between streams, which autograd itself arranges.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    with process.autocast():
        loss = torch.cuda.make_graphed_callables(Loss(), (x, x.clone()))
    return lambda x, y, need_logits: (None, loss(x, y))


# Metrics


class Log:
    """The metrics of a step go to the console, to out_dir/log.csv and to TensorBoard."""

    COLUMNS = ("step", "seconds", "loss", "train_loss", "val_loss", "bits_per_byte",
               "lr", "grad_norm", "tokens_per_second", "mfu")  # fmt: skip

    def __init__(self, config: TrainConfig, state: State, process: Process):
        self.config, self.state, self.process = config, state, process
        self.path, self.writer = config.path("log.csv"), None
        self.flops_per_token = flops_per_token(state.model, config.block_size)
        self.peak_flops = peak_flops(process)
        self.pace = []  # seconds a step, one figure a report
        self.start_clock()
        self.rows = self.rows_until(state.step)  # of the run that is resumed: {step: row}
        self.started = self.since - max((float(row["seconds"]) for row in self.rows.values()), default=0)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.open_writer = partial(SummaryWriter, config.out_dir, purge_step=state.step + (state.step > 0))
            with explained(f"data/{config.dataset}/meta.json has no usable tokenizer"):
                self.tokenizer = tokenizer_of(state.meta)

    def rows_until(self, step: int) -> dict[int, dict[str, object]]:
        """The rows of log.csv that a run resumed at `step` keeps, none at step 0; damaged ones are dropped."""
        rows = {}
        text = self.path.read_text(errors="replace") if step and self.path.exists() else ""
        for line in text.splitlines():
            with suppress(ValueError):
                row = dict(zip(self.COLUMNS, line.split(","), strict=True))
                if int(row["step"]) <= step and float(row["seconds"]) >= 0:
                    rows[int(row["step"])] = row
        return rows

    def begin(self) -> None:
        """Open log.csv and TensorBoard's events, without the steps that will be taken again."""
        self.replace_rows()
        if self.config.tensorboard:
            self.writer = self.open_writer()

    def replace_rows(self) -> None:
        with replacing(self.path) as file:
            file.write("".join(map(self.line, ({name: name for name in self.COLUMNS}, *self.rows.values()))).encode())

    def line(self, row: dict[str, object]) -> str:
        return ",".join(str(row.get(column, "")) for column in self.COLUMNS) + "\n"

    def start_clock(self) -> None:
        self.since_step, self.since = self.state.step, time.perf_counter()

    def seconds(self) -> float:
        """Of the whole run: this start, and the earlier ones up to their last row in log.csv."""
        return time.perf_counter() - self.started

    def cost(self) -> str:
        on_gpu = self.process.device.type == "cuda"
        memory = f" and at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory" if on_gpu else ""
        return f"{self.seconds():.0f} s{memory}"

    def measure(self, loss: float, grad_norm: float) -> dict[str, float]:
        """The metrics of the last step; its speed is the mean since the clock was started."""
        self.pace.append((time.perf_counter() - self.since) / (self.state.step - self.since_step))
        speed = self.config.batch_size * self.config.block_size / self.pace[-1]  # tokens a second
        lr = learning_rate(self.state.step - 1, self.config)
        metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        return metrics | ({"mfu": self.flops_per_token * speed / self.peak_flops} if self.peak_flops else {})

    def show(self, metrics: dict[str, float]) -> None:
        """Show the losses of an evaluation, and how far the run is."""
        step, config = self.state.step, self.config
        if "val_loss" in metrics:
            show(f"step {step}: train loss {metrics['train_loss']:.4f}, val loss {metrics['val_loss']:.4f}")
        if "bits_per_byte" in metrics:
            show(f"step {step}: {metrics['bits_per_byte']:.4f} bits per byte of the validation text")
        if "loss" not in metrics:
            return
        left = (config.max_iters - step) * np.median(self.pace[1:][-9:] or self.pace)  # the first step is slow
        speed, mfu = metrics["tokens_per_second"] / 1e3, f"mfu {metrics['mfu']:.0%} | " if "mfu" in metrics else ""
        text = f"step {step}/{config.max_iters} | loss {metrics['loss']:.2f} | lr {metrics['lr']:.1e} | "
        text += f"grad {metrics['grad_norm']:.2f} | {speed:,.{int(speed < 10)}f}k tok/s | {mfu}"
        progress.show(f"{text}eta {timedelta(seconds=round(left))}")

    def write(self, metrics: dict[str, float]) -> None:
        """Add the row of this step; where a resumed run repeats an evaluation, replace its columns in the old row."""
        step = self.state.step
        row = {"step": step, "seconds": round(self.seconds(), 3)} | self.rows.get(step, {}) | {"bits_per_byte": ""}
        row |= {name: f"{value:.7g}" for name, value in metrics.items()}
        repeated, self.rows[step] = step in self.rows, row
        if repeated:
            self.replace_rows()
        else:
            with open(self.path, "a") as file:
                file.write(self.line(row))
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
            if "val_loss" in metrics:  # indented: Markdown shows it verbatim
                self.writer.add_text("sample", "    " + self.sample().replace("\n", "\n    "), step)
            self.writer.flush()

    def sample(self) -> str:
        """What the model writes by now: 200 tokens."""
        generator = torch.Generator(self.process.device).manual_seed(self.config.seed)
        start = torch.tensor([[first_token(self.tokenizer)]], device=self.process.device)
        tokens = self.state.model.generate(start, 200, temperature=0.8, generator=generator)
        return self.tokenizer.decode(tokens[0].cpu().numpy())


def flops_per_token(model: LanguageModel, block_size: int) -> int:
    """Floating-point operations of training on one token: 6 per weight, 12 T C per attention (PaLM, appendix B)."""
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    attentions = model.config.n_layer if isinstance(model, GPT) else 0
    return 6 * weights + 12 * attentions * block_size * model.config.n_embd


def flops_of_run(model: LanguageModel, config: TrainConfig) -> int:
    return flops_per_token(model, config.block_size) * config.batch_size * config.block_size * config.max_iters


def peak_flops(process: Process) -> float | None:
    """Peak FLOP/s of all processes' devices together; None where unknown."""
    if process.device.type != "cuda" or process.dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(process.device)
    peaks = (peak for card, peak in PEAK_FLOPS.items() if re.search(card, name) and "MIG" not in name)
    return next((peak * process.world_size for peak in peaks), None)


if __name__ == "__main__":
    run(main)
