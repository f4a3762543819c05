"""How a model learns. Read `main` for the run from start to end, `train_step` for what one step is.

One idea: step k of a run is a pure function of (weights, optimizer state, config, data, k). Its batch is drawn from
(seed, k), its dropout from (seed, k, rank, micro-batch), evaluation reads fixed blocks. So a run that died goes on bit
for bit, one process and eight see the same batches, and losses can be compared.

    python train.py                                          the reference model on Tiny Shakespeare
    python train.py config/shakespeare_char_cpu.py           a small one, two minutes on a laptop
    torchrun --nproc_per_node=8 train.py --n_layer=12        many GPUs, other values
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as short
from typing import IO, Any, Literal

# While torch is loaded, Ctrl-C just ends the program; then `run` sees to it. What ignores it goes on ignoring it.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import ConfigError, UserError, did_you_mean, extra, key, read, run
from model import GPT, Bigram, CausalSelfAttention, GPTConfig, LanguageModel
from prepare import (
    TOKEN,
    PrepareConfig,
    dataset_folder,
    first_token,
    load_meta,
    prepare,
    replacing,
    token_file,
    tokenizer_of,
)

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two runs apart
    fcntl = None

MODELS = {"gpt": GPT, "bigram": Bigram}
STARTS = ("auto", "scratch", "resume")  # init_from is one of these or says whose weights to begin with
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SHAPE = ("n_layer", "n_head", "n_embd", "bias", "feed_forward", "residual", "layer_norm")
TOKENIZER = ("tokenizer", "vocab_size", "chars", "json")  # what meta.json says of it, and a checkpoint too
CHECKPOINT = {
    "model": dict,
    "model_config": dict,
    "step": int,
    "best_val_loss": float,
    "config": dict,
    "tokenizer": dict,
}
SMALL = 2**30  # bytes; a split below this lives on the device, a larger one on disk
# Dense bfloat16 FLOP/s of the cards whose name has this in it; from NVIDIA's data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 80GB HBM3": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
}


@dataclass
class TrainConfig:
    """Train a GPT. The same command typed again goes on where the last one stopped."""

    out_dir: str = key("out", "folder for checkpoints and log")
    dataset: str = key("shakespeare_char", "folder under data/, made by prepare.py")
    init_from: str = key(
        "auto",
        "auto: resume where out_dir has a checkpoint; scratch; resume; or weights to begin with: gpt2, gpt2-medium, "
        "gpt2-large, gpt2-xl, a folder in Hugging Face's format, a checkpoint file, nanoGPT's too",
    )

    model: Literal["gpt", "bigram"] = key("gpt", "what to train")
    n_layer: int = key(6, "blocks")
    n_head: int = key(6, "attention heads in each block")
    n_embd: int = key(384, "channels")
    block_size: int = key(256, "longest context, in tokens")
    dropout: float = key(0.2, "share of activations dropped in training")
    bias: bool = key(False, "biases in linear layers and layer norms")
    feed_forward: bool = key(True, "a feed-forward layer after attention")
    residual: bool = key(True, "residual connections")
    layer_norm: bool = key(True, "layer norms")

    batch_size: int = key(64, "sequences in one optimizer step, over all processes together")
    gradient_accumulation_steps: int = key(1, "micro-batches into which each process splits its share")
    learning_rate: float = key(1e-3, "peak learning rate")
    min_lr: float = key(1e-4, "learning rate at the end of the decay")
    warmup_iters: int = key(100, "steps of linear warm-up")
    lr_decay_iters: int | None = key(None, "step at which the decay ends; None: max_iters")
    decay_lr: bool = key(True, "cosine decay after the warm-up; False: stay at the peak")
    max_iters: int = key(5000, "optimizer steps")
    weight_decay: float = key(0.1, "AdamW's weight decay, on matrices only")
    beta1: float = key(0.9, "AdamW's decay rate for the mean of the gradients")
    beta2: float = key(0.99, "AdamW's decay rate for the mean of their squares")
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping")

    eval_interval: int = key(250, "steps between evaluations, each of which writes a checkpoint")
    eval_iters: int = key(0, "batches of each evaluation; 0: the whole validation split")
    eval_only: bool = key(False, "evaluate once and end, writing nothing")
    log_interval: int = key(10, "steps between progress lines")

    seed: int = key(1337, "of initial weights, batches and dropout")
    device: str = key("auto", "cuda, cuda:N, mps or cpu; auto: the first of them that is there")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "of matrix products; auto: the fastest safe one"
    )
    compile: Literal["auto"] | bool = key("auto", "torch.compile the model; auto: on cuda")
    tensorboard: bool = key(False, "also write the curves, the settings and samples for TensorBoard to out_dir")

    def __post_init__(self):
        counts = ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "log_interval")
        for name in (*counts, "lr_decay_iters"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("learning_rate", "min_lr", "warmup_iters", "weight_decay", "grad_clip", "eval_iters"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, found {self.seed}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}")
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above learning_rate ({self.learning_rate})")
        if self.init_from not in STARTS:
            self.init_from = os.path.normpath(self.init_from)
            if not self.path("ckpt.pt").exists():  # which goes on without what it began with
                check_source(self.init_from, STARTS)
        if not self.out_dir:
            raise ValueError("out_dir is empty: it must name a folder")
        dataset_folder(self.dataset)
        self.model_config(vocab_size=1)

    def micro_batch_size(self, world_size: int) -> int:
        """Sequences that one process reads at a time. Raises ConfigError when the batch cannot be divided so."""
        rows, rest = divmod(self.batch_size, world_size * self.gradient_accumulation_steps)
        if rest:
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be divisible by the number of processes ({world_size}) "
                f"x gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            )
        return rows

    def path(self, name: str) -> Path:
        return Path(self.out_dir) / name

    def model_config(self, vocab_size: int) -> GPTConfig:
        shared = {field.name for field in fields(self)} & {field.name for field in fields(GPTConfig)}
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in shared})


def main(argv: list[str]) -> int | None:
    """Train; returns the exit status of a run that a signal has stopped."""
    config = read(TrainConfig, argv)
    process = join_processes(config)
    meta = prepared_dataset(config.dataset, process)
    splits = {split: Tokens(split, meta, config, process.device) for split in ("train", "val")}
    with alone_in_out_dir(config, process):
        state = initial_state(config, meta, process)
        model = parallel_and_compiled(state.model, config, process)

        with Log(config, state, process) as log:
            if state.step == 0 or config.eval_only:
                evaluate_and_save(state, splits, config, process, log)
            stop = 0  # or the signal that asked for it
            pending = []  # figures of the steps since the last progress line: nothing has waited for the device yet
            with StopSignals() as signals:
                while state.step < config.max_iters and not config.eval_only:
                    if stop := process.largest(signals.received):
                        save_unfinished(state, pending, config, process)
                        break
                    pending.append(train_step(model, state, splits["train"], config, process))
                    state.step += 1
                    evaluating = state.step % config.eval_interval == 0 or state.step == config.max_iters
                    if evaluating or state.step % config.log_interval == 0 or state.step == 1:
                        log.progress(state.step, *checked(pending, state, config, process))
                        pending.clear()
                    if evaluating:
                        evaluate_and_save(state, splits, config, process, log)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another one still writes
    if stop:
        again = "the same command without --init_from" if config.init_from == "scratch" else "the same command"
        process.say(f"stopped by {signal.Signals(stop).name} after step {state.step}; {again} goes on from there")
        return 128 + stop
    if not config.eval_only:
        process.say(f"best validation loss {state.best_val_loss:.4f}; try python sample.py --out_dir={config.out_dir}")


def train_step(model: nn.Module, state: State, tokens: Tokens, config: TrainConfig, process: Process) -> Tensor:
    """One step down the gradient of batch `state.step`. Returns (loss, gradient norm), still on the device."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, config)
    micro_steps = config.gradient_accumulation_steps
    total_loss = torch.zeros((), device=process.device)
    for micro_step in range(micro_steps):
        x, y = batch(tokens, state.step, micro_step, config, process)
        torch.manual_seed(seed_from(config.seed, state.step, process.rank, micro_step))  # of dropout
        # The processes average their gradients once, while the last micro-batch is on its way back.
        with model.no_sync() if process.world_size > 1 and micro_step < micro_steps - 1 else nullcontext():
            with process.autocast():
                _, loss = model(x, y)
            state.scaler.scale(loss / micro_steps).backward()
        total_loss += loss.detach() / micro_steps
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return torch.stack((total_loss, grad_norm))


def checked(figures: list[Tensor], state: State, config: TrainConfig, process: Process) -> tuple[float, float]:
    """Loss and gradient norm of the last step, over all processes. Raises UserError if any step's is not finite."""
    rows = (process.sum(torch.stack(figures)) / process.world_size).tolist()
    for step, (loss, grad_norm) in enumerate(rows, state.step - len(rows) + 1):
        # A float16 gradient may overflow: the scaler skips that step and lowers the scale.
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or state.scaler.is_enabled()):
            raise diverged(f"loss is {loss}, gradient norm {grad_norm}", step, config)
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
    progress = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


# Data


class Tokens:
    """One split of a dataset. A small one moves to the device; of a large one, each batch is read from disk."""

    def __init__(self, split: str, meta: dict, config: TrainConfig, device: torch.device):
        self.path, self.n_tokens = token_file(config.dataset, split, meta)
        if self.n_tokens <= config.block_size:
            raise UserError(
                f"{self.path} has {self.n_tokens} tokens, too few for block_size {config.block_size} and a target: "
                "lower --block_size or prepare a longer text"
            )
        self.vocab_size = meta["vocab_size"]
        self.n_bytes = meta.get(f"{split}_bytes")  # of its text, where that is known
        self.device = device
        self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (read as long as this object lives)
        small = self.n_tokens * TOKEN.itemsize < SMALL
        self.ids = self.read(0, self.n_tokens).to(device) if small else None

    def __len__(self) -> int:
        return self.n_tokens

    def read(self, start: int, n_tokens: int) -> Tensor:
        """Token ids (n_tokens,) from disk as int16, which torch gathers on every device, uint16 not."""
        self.file.seek(start * TOKEN.itemsize)
        ids = np.fromfile(self.file, TOKEN, n_tokens)
        problem = None
        if len(ids) < n_tokens:
            problem = f"{self.path} became shorter while it was read: prepare the dataset anew"
        elif ids.max() >= self.vocab_size:
            problem = f"{self.path} has token id {ids.max()}; the vocabulary has {self.vocab_size} tokens"
        if problem:  # what only this process reads, it must say itself: an OSError is said by every process
            raise (UserError if n_tokens == self.n_tokens else OSError)(problem)
        return torch.from_numpy(ids.view("<i2"))

    def blocks(self, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, length) that begin at `starts` (B,), and as targets the same shifted by one: the next tokens."""
        if self.ids is None:
            rows = send(torch.stack([self.read(int(start), length + 1) for start in starts]), self.device)
        else:
            starts = send(torch.from_numpy(starts), self.device)
            rows = self.ids[starts[:, None] + torch.arange(length + 1, device=self.device)]
        rows = rows.long() & 0xFFFF  # (B, length + 1), unsigned again
        return rows[:, :-1], rows[:, 1:]  # shifted by one: every position predicts the token after it


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it: from pinned memory a GPU fetches by itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def batch(tokens: Tokens, step: int, micro_step: int, config: TrainConfig, process: Process) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, block_size) of one micro-batch of a step.

    Every process draws the starts of the whole batch and takes its own: the batch is the same, however many share it.
    """
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(len(tokens) - config.block_size, size=config.batch_size)
    rows = config.micro_batch_size(process.world_size)
    first = (process.rank * config.gradient_accumulation_steps + micro_step) * rows
    return tokens.blocks(starts[first : first + rows], config.block_size)


def seed_from(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def prepared_dataset(dataset: str, process: Process) -> dict:
    """meta.json of the dataset; process 0 prepares it when it is missing, while the others wait."""

    def prepare_and_load() -> dict:
        if not (dataset_folder(dataset) / "meta.json").exists():
            prepare(PrepareConfig(dataset=dataset))
        return load_meta(dataset)

    return process.from_rank_0(prepare_and_load)


# Evaluation


def evaluate_and_save(state: State, splits: dict[str, Tokens], config: TrainConfig, process: Process, log: Log) -> None:
    """Evaluate; then write ckpt.pt, and best.pt if no validation loss was lower."""
    n_tokens = len(splits["val"]) - 1
    if config.eval_iters:
        n_tokens = min(n_tokens, config.eval_iters * config.batch_size * config.block_size)
    train_loss, val_loss = (
        evaluate(state.model, splits[split], n_tokens, config, process) for split in ("train", "val")
    )
    bits_per_byte = None  # of text: what tokenizers of every kind can be compared by
    if splits["val"].n_bytes and n_tokens == len(splits["val"]) - 1:
        bits_per_byte = val_loss / math.log(2) * len(splits["val"]) / splits["val"].n_bytes
    log.evaluation(state.step, train_loss, val_loss, bits_per_byte)
    if not math.isfinite(val_loss):
        raise diverged(f"validation loss is {val_loss}", state.step, config)
    better = val_loss < state.best_val_loss
    state.best_val_loss = min(val_loss, state.best_val_loss)
    if process.rank == 0 and not config.eval_only:
        if better:
            state.save(config.path("best.pt"), config)
        state.save(config.path("ckpt.pt"), config, to_resume=True)
    log.restart_clock(state.step)


def save_unfinished(state: State, pending: list[Tensor], config: TrainConfig, process: Process) -> None:
    """Write ckpt.pt between two evaluations, if the steps since the last progress line are sound."""
    if pending:
        checked(pending, state, config, process)
    if process.rank == 0:
        state.save(config.path("ckpt.pt"), config, to_resume=True)


@torch.no_grad()
def evaluate(model: LanguageModel, tokens: Tokens, n_tokens: int, config: TrainConfig, process: Process) -> float:
    """Mean loss, in nats a token, of predicting the first `n_tokens` tokens that follow another, block after block.

    The processes share the work. The model is not the compiled one: that would be compiled a second time, for nothing.
    """
    n_tokens = min(n_tokens, len(tokens) - 1)
    length = config.block_size
    rows = max(config.micro_batch_size(process.world_size), 8192 // length)  # of short blocks more at a time
    starts = np.arange(0, n_tokens - length + 1, length)
    groups = [(starts[i : i + rows], length) for i in range(0, len(starts), rows)]
    if rest := n_tokens % length:
        groups.append((np.array([n_tokens - rest]), rest))
    model.eval()
    total = 0.0
    for group, length in groups[process.rank :: process.world_size]:
        with process.autocast():
            _, loss = model(*tokens.blocks(group, length))
        total += loss.item() * len(group) * length
    model.train()
    return process.sum(torch.tensor(total, dtype=torch.float64)).item() / n_tokens


# State and checkpoints


@dataclass
class State:
    """All that a run is at one moment; `step` counts finished optimizer steps."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokenizer: dict
    init_from: str = "auto"  # what the run began with
    step: int = 0
    best_val_loss: float = math.inf

    def settings(self, config: TrainConfig) -> dict:
        """The config, with the shape that the model really has: it may be that of the weights it began with."""
        settings = asdict(config) | {"init_from": self.init_from}
        return settings | {name: value for name, value in asdict(self.model.config).items() if name in settings}

    def save(self, path: Path, config: TrainConfig, to_resume: bool = False) -> None:
        """Write what `sample.py` needs; to resume, the optimizer too."""
        checkpoint = {
            "format": 1,
            "model": self.model.state_dict(),
            "model_config": asdict(self.model.config),
            "step": self.step,
            "best_val_loss": self.best_val_loss,
            "config": self.settings(config),
            "tokenizer": self.tokenizer,
        }
        if to_resume:
            checkpoint |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        with replacing(path) as file:
            torch.save(checkpoint, file)


def initial_state(config: TrainConfig, meta: dict, process: Process) -> State:
    """The state of out_dir/ckpt.pt, or a new one. Raises ConfigError when its model does not fit config or dataset."""
    path = config.path("ckpt.pt")
    checkpoint = find_checkpoint(path, config.init_from)
    if process.from_rank_0(lambda: checkpoint and checkpoint["step"]) != (checkpoint and checkpoint["step"]):
        raise UserError(f"{path} is not the same on every machine: all must see the same folder")
    init_from = checkpoint["config"].get("init_from") if checkpoint else config.init_from
    tokenizer = {name: meta[name] for name in TOKENIZER if name in meta}
    wanted = {"model": config.model, **asdict(config.model_config(meta["vocab_size"])), **tokens_of(tokenizer)}
    if checkpoint:
        model, found_tokenizer = model_of(checkpoint, path, config.dropout), checkpoint["tokenizer"]
    elif init_from in STARTS:
        torch.manual_seed(config.seed)
        model, found_tokenizer = MODELS[config.model](config.model_config(meta["vocab_size"])), tokenizer
    else:
        model, found_tokenizer = pretrained(init_from, config.dropout, config.block_size)
    found = {"model": {GPT: "gpt", Bigram: "bigram"}[type(model)], **asdict(model.config), **tokens_of(found_tokenizer)}
    if init_from not in STARTS:  # then the shape is that of the weights, whatever config says
        wanted |= {name: found[name] for name in SHAPE}
    if config.init_from not in STARTS:
        found, wanted = found | {"init_from": init_from}, wanted | {"init_from": config.init_from}
    or_scratch = " or --init_from=scratch" if init_from in STARTS else ""
    if differences := changes(found, {name: wanted[name] for name in wanted if name in found}):
        if checkpoint:
            raise ConfigError(f"{path} holds another model ({differences}): take another --out_dir{or_scratch}")
        raise ConfigError(f"{init_from} does not fit these settings and data/{config.dataset} ({differences})")
    model.to(process.device)
    # Small float16 gradients would vanish without a scale; the other types need none.
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    state = State(model, adamw(model, config), scaler, tokenizer, init_from)
    if checkpoint:
        try:
            groups = state.optimizer.state_dict()["param_groups"]  # this config's, not the old one's
            state.optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": groups})
            for parameter in model.parameters() if checkpoint["step"] else ():
                shapes = {name: value.shape for name, value in state.optimizer.state[parameter].items()}
                if shapes != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
                    raise ValueError("its optimizer state does not fit its weights")
            if checkpoint["scaler"]:  # of a float16 run
                if not all(isinstance(value, int | float) for value in checkpoint["scaler"].values()):
                    raise ValueError(f"scaler is {short(checkpoint['scaler'])}")
                scaler.load_state_dict(checkpoint["scaler"])
        except Exception as error:
            raise unusable(path, error) from None
        state.step, state.best_val_loss = checkpoint["step"], checkpoint["best_val_loss"]
        changed = changes(checkpoint["config"], state.settings(config))
        process.say(f"going on from {path} at step {state.step}" + (f"; changed since: {changed}" if changed else ""))
    elif init_from not in STARTS:
        process.say(f"starting from {init_from}: {', '.join(f'{name} {found[name]}' for name in SHAPE)}")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    process.say(f"{n_parameters / 1e6:.2f}M parameters on {process}")
    if state.step >= config.max_iters and not config.eval_only:
        process.say(
            f"max_iters ({config.max_iters}) is reached: raise it to go on, or take another --out_dir{or_scratch}"
        )
    return state


def find_checkpoint(path: Path, init_from: str) -> dict | None:
    if init_from == "scratch" and was_restarted() and path.exists():
        raise ConfigError(f"after a failure --init_from=scratch would overwrite {path}; without it, the run goes on")
    if init_from == "scratch":
        return None
    best = path.with_name("best.pt")  # alone, of step 0, it is what a run killed before its first ckpt.pt leaves behind
    if not path.exists() and best.exists() and load_checkpoint(best)["step"]:
        raise ConfigError(
            f"there is {best} but no {path}: begin with it by --init_from={best} and another --out_dir, "
            "or overwrite it by --init_from=scratch"
        )
    if not path.exists() and init_from != "resume":
        return None
    if not path.exists():
        raise ConfigError(f"there is no {path} to resume; --init_from=scratch starts a new run")
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise ConfigError(f"{path} holds weights only: begin with them by --init_from={path} and another --out_dir")
    return checkpoint


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint into CPU memory, running no code of it. Raises UserError when it is not whole."""
    try:
        with zipfile.ZipFile(path) as container:
            if damaged := container.testzip():  # torch itself does not look at the checksums
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "model_args" in checkpoint:
            checkpoint = from_nanogpt(checkpoint)
        if checkpoint["format"] != 1:
            raise ValueError(f"format {checkpoint['format']}, expected 1")
        for name, kind in CHECKPOINT.items():
            if not isinstance(checkpoint[name], kind):
                raise ValueError(f"{name} is {short(checkpoint[name])}")
        if checkpoint["step"] < 0 or math.isnan(checkpoint["best_val_loss"]):
            raise ValueError(f"step {checkpoint['step']}, best_val_loss {checkpoint['best_val_loss']}")
        return checkpoint
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever a damaged or hostile file sets off
        raise unusable(path, error) from None


def from_nanogpt(theirs: dict) -> dict:
    """A checkpoint of nanoGPT in the form of ours, without its optimizer. It does not say what its tokens mean."""
    shape, weights, dataset = theirs["model_args"], theirs["model"], theirs["config"]["dataset"]
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}  # an old mask
    if shape["vocab_size"] == 50304:  # GPT-2's 50,257 tokens rounded up for speed: the rest never occurs
        shape = shape | {"vocab_size": 50257}
        weights |= {name: weights[name][:50257] for name in ("transformer.wte.weight", "lm_head.weight")}
    path = dataset_folder(dataset) / "meta.json"
    meta = load_meta(dataset) if path.exists() else {"tokenizer": "gpt2", "vocab_size": 50257}
    if meta["vocab_size"] != shape["vocab_size"]:
        raise UserError(
            f"this checkpoint of nanoGPT has {shape['vocab_size']} tokens, but {path} "
            f"{'has ' + str(meta['vocab_size']) if path.exists() else 'is missing'}: "
            f"python prepare.py --dataset={dataset} --input=FILE makes it from the text it was trained on"
        )
    return {
        "format": 1,
        "model": weights,
        "model_config": shape,
        "step": theirs["iter_num"],
        "best_val_loss": float(theirs["best_val_loss"]),
        "config": {"model": "gpt"},
        "tokenizer": {name: meta[name] for name in TOKENIZER if name in meta},
    }


def tokens_of(tokenizer: dict) -> dict:
    """What its tokens mean, whatever the tokenizer is called; what is not known is left out."""
    meaning = {name: tokenizer[name] for name in ("vocab_size", "chars") if name in tokenizer}
    try:
        content = json.loads(tokenizer["json"])
        tokens = json.dumps((content["model"], content["added_tokens"]), sort_keys=True)
        return meaning | {"tokens": hashlib.sha256(tokens.encode()).hexdigest()[:16]}
    except (KeyError, TypeError, ValueError, RecursionError):
        return meaning


def check_source(source: str, others: tuple[str, ...] = ()) -> None:
    """Raise ValueError if init_from is neither one of the names nor a file or folder."""
    if source not in GPT2_NAMES and not Path(source).exists():
        known = (*others, *GPT2_NAMES)
        raise ValueError(
            f"init_from must be {', '.join(known)}, a folder in Hugging Face's format or a checkpoint file, "
            f"found {source!r}{did_you_mean(source, known)}"
        )


def pretrained(source: str | Path, dropout: float = 0.0, block_size: int | None = None) -> tuple[LanguageModel, dict]:
    """The model of a checkpoint file or its folder, or in Hugging Face's format; and, of the former, its tokenizer.

    Raises UserError for one that cannot be used.
    """
    path = next((file for name in ("best.pt", "ckpt.pt") if (file := Path(source) / name).is_file()), Path(source))
    try:
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            raise ValueError("of a model in Hugging Face's format, name the folder")
        if path.is_dir() and not (path / "config.json").is_file():
            raise ValueError("there is neither a checkpoint nor a config.json in it")
        if path.is_file():
            checkpoint = load_checkpoint(path)
            model, tokenizer = model_of(checkpoint, path, dropout), checkpoint["tokenizer"]
        else:
            model, tokenizer = GPT.from_pretrained(source, dropout), {}
        if block_size and isinstance(model, GPT):
            model.crop(block_size)
        return model, tokenizer
    except (UserError, MemoryError):
        raise
    except Exception as error:  # transformers has many
        offline = "; a folder with its files works without network" if isinstance(error, OSError) else ""
        raise UserError(f"cannot begin with {source}: {first_line(error)}{offline}") from None


def model_of(checkpoint: dict, path: Path, dropout: float = 0.0) -> LanguageModel:
    """The model that a checkpoint holds. Raises UserError when its weights do not fit its config."""
    try:
        build = MODELS[checkpoint["config"]["model"]]
        config, weights = GPTConfig(**checkpoint["model_config"] | {"dropout": dropout}), checkpoint["model"]
        with torch.device("meta"):  # takes no memory, whatever sizes a damaged config has
            expected = build(config).state_dict() if build is Bigram or config.n_layer <= len(weights) else {}
        found, wanted = ({name: (t.shape, t.dtype) for name, t in all_.items()} for all_ in (weights, expected))
        if found != wanted:
            raise ValueError("its weights are not those of its model_config")
        model = build(config)
        model.load_state_dict(weights)
        return model
    except Exception as error:
        raise unusable(path, error) from None


def unusable(path: Path, error: Exception) -> UserError:
    reason = first_line(error)
    if isinstance(error, pickle.UnpicklingError):  # torch advises to run the code
        reason = "it holds more than tensors and plain values"
    return UserError(
        f"{path} is not a usable checkpoint ({type(error).__name__}: {reason}); bring back a copy of it, "
        "or start over in another --out_dir"
    )


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def changes(old: dict, new: dict) -> str:
    """What differs, in few words: "dropout 0.1 -> 0.2, seed 1 -> 2"."""
    different = {name: value for name, value in new.items() if repr(old.get(name)) != repr(value)}
    return ", ".join(f"{name} {short(old.get(name))} -> {short(value)}" for name, value in different.items())


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) with decay on matrices only: gains and biases have no reason to be small."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


# Devices and processes


@dataclass(frozen=True)
class Process:
    """This process among the `world_size` that torchrun started (one, without torchrun), its device and number type."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    cpu_group: dist.ProcessGroup | None = None  # what GPUs need not wait for; None: all processes are on CPUs anyway

    def autocast(self) -> torch.autocast:
        """Matrix products in `dtype`; weights, sums and losses stay float32 (Micikevicius et al., 2018)."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, figures: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world_size > 1:
            figures = figures.to(self.device)
            dist.all_reduce(figures)
        return figures

    def largest(self, number: int) -> int:
        """The largest that any process has: one call a step makes all of them stop at the same one."""
        if self.world_size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.cpu_group)
        return int(numbers)

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in process 0, or the error that it raises there, in every process; the others wait."""
        made = [None]
        if self.rank == 0:
            try:
                made = [make()]
            except (UserError, OSError) as error:
                made = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(made, device=self.device)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{self.world_size} x {name}, {str(self.dtype).removeprefix('torch.')}"


def join_processes(config: TrainConfig) -> Process:
    """Take this process's place among those of torchrun. Raises ConfigError where batch or device do not allow it."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config.micro_batch_size(world_size)
    device = choose_device(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # what autocast leaves in float32 may use TF32
    dtype, cpu_group = choose_dtype(config.dtype, device), None
    if world_size > 1:
        place = {}
        if os.environ.get("GROUP_WORLD_SIZE") == "1" and was_restarted():
            # torchrun keeps its store, with the addresses of the dead processes (pytorch issue 135712).
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            place = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **place)
        cpu_group = dist.new_group(backend="gloo") if device.type == "cuda" else None
    return Process(rank, world_size, device, dtype, cpu_group)


def was_restarted() -> bool:
    """Whether torchrun has started this process again after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


class StopSignals:
    """Note the first SIGINT (Ctrl-C) or SIGTERM, to end the run after its step; the next one acts as it always does."""

    received = 0

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:  # as a shell script starts what it puts into the background
                signal.signal(number, self.note)
        return self

    def note(self, number: int, _frame: object) -> None:
        self.received = number
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def alone_in_out_dir(config: TrainConfig, process: Process) -> Iterator[None]:
    """Keep other runs out of out_dir. The system ends the lock with the process, however that ends."""
    locks = []
    try:
        if not config.eval_only:
            process.from_rank_0(lambda: locks.append(lock(config.path("lock"))))
        yield
    finally:
        for file in locks:
            file.close()


def lock(path: Path) -> IO[str]:
    """A file that only one process holds open. Raises UserError that names the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 (locked as long as it is open)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            raise UserError(
                f"{path.parent} is in use by another run, process {file.read()}: let it end, or take another --out_dir"
            ) from None
    except OSError:
        pass  # a file system without locks
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free; otherwise the system takes it back and zeroes it anew, again and again.

    A step of config/shakespeare_char_cpu.py takes 26 ms instead of 33, one of the reference model a tenth less.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # musl has none
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: do not give back the end of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor


def choose_device(name: str, processes: int = 1) -> torch.device:
    """The device of that name, or the best one, for each of so many processes. Raises ConfigError for none."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cuda"] * bool(gpus) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if processes > 1:  # one GPU each, and gloo for the CPU; nothing connects processes on mps
        there = ["cuda"] * (gpus >= processes) + ["cpu"]
    else:
        there += [f"cuda:{index}" for index in range(gpus)]
    if name == "auto":
        return torch.device(there[0])
    if name not in there:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise ConfigError(f"there is no device {name!r}{each}; there is {', '.join(there)}")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type of that name, or the fastest that is safe on the device. Raises ConfigError for an unsafe one."""
    if name == "float16" and device.type != "cuda":
        raise ConfigError(f"float16 needs the loss scaling of a cuda device, found {device}; use bfloat16 or float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Without such instructions bfloat16 is emulated; and AVX-512's are slow in an Intel CPU (a Xeon of family 6, model
    # 207, AMX hidden: half of float32's FLOP/s, a step of the small recipe takes 1.6 times as long), fast in an AMD.
    cpu = torch.cpu.get_capabilities()
    fast = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", ""))
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def parallel_and_compiled(model: nn.Module, config: TrainConfig, process: Process) -> nn.Module:
    """The same weights, for training: gradients averaged over the processes, kernels fused."""
    if process.world_size > 1:
        model = DistributedDataParallel(model)
    if config.compile is True or (config.compile == "auto" and process.device.type == "cuda"):
        try:
            torch.compile(torch.exp)(torch.ones(1, device=process.device))  # is there a compiler that works?
            model = torch.compile(model)
        except Exception as error:
            process.say(f"torch.compile does not work here ({type(error).__name__}): going on without it")
    return model


# What the user sees


class Log:
    """The console, where a terminal rewrites the progress line in place, and out_dir/log.csv with a row per line."""

    COLUMNS = ("step", "seconds", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "mfu")

    def __init__(self, config: TrainConfig, state: State, process: Process):
        self.config, self.process = config, process
        self.flops_per_token = flops_per_token(state.model, config.block_size)
        self.peak_flops = peak_flops(process)
        self.progress_stream = sys.stdout if sys.stdout.isatty() else sys.stderr  # not into what is piped on
        self.open_width = 0  # of the line that the next one takes the place of
        self.warned = False
        self.path = None if process.rank or config.eval_only else config.path("log.csv")
        self.board = Board(config, state) if config.tensorboard and self.path else None
        self.started = time.perf_counter()
        if self.path:
            rows = self.rows_until(state.step)
            if rows:
                self.started -= float(rows[-1].split(",")[1])
            with replacing(self.path) as file:
                file.write("".join([",".join(self.COLUMNS) + "\n", *rows]).encode())
        self.restart_clock(state.step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        if self.open_width:
            print(file=self.progress_stream)
        if self.board:
            self.board.writer.close()

    def rows_until(self, step: int) -> list[str]:
        """The rows that a run resumed at `step` keeps: whole ones, of steps that it will not take again."""
        if step == 0 or not self.path.exists():
            return []
        rows = self.path.read_text(errors="replace").splitlines(keepends=True)
        whole = [row for row in rows if re.fullmatch(r"\d+,\d+(\.\d+)?(,[^,]*){6}\n", row)]
        return [row for row in whole if int(row.split(",")[0]) <= step]

    def restart_clock(self, step: int) -> None:
        """Measure speed from here on."""
        self.since, self.since_step = time.perf_counter(), step

    def evaluation(self, step: int, train_loss: float, val_loss: float, bits_per_byte: float | None) -> None:
        self.line(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        if bits_per_byte:
            self.line(f"step {step}: {bits_per_byte:.4f} bits per byte of the validation text")
        self.row(step=step, train_loss=train_loss, val_loss=val_loss)
        if self.board:
            losses = {"loss/train": train_loss, "loss/val": val_loss, "loss/val_bits_per_byte": bits_per_byte}
            self.board.scalars(step, losses)
            self.board.sample(step)

    def progress(self, step: int, loss: float, grad_norm: float) -> None:
        seconds = (time.perf_counter() - self.since) / (step - self.since_step)  # of one step
        self.restart_clock(step)
        speed = self.config.batch_size * self.config.block_size / seconds
        mfu = self.flops_per_token * speed / self.peak_flops if self.peak_flops else None
        left = (self.config.max_iters - step) * seconds
        lr = learning_rate(step - 1, self.config)
        self.line(
            f"step {step}/{self.config.max_iters} | loss {loss:.2f} | lr {lr:.1e} | grad {grad_norm:.2f} | "
            f"{speed / 1e3:,.{int(speed < 1e4)}f}k tok/s | {f'mfu {mfu:.0%} | ' if mfu else ''}eta {clock(left)}",
            stays=False,
        )
        figures = {"lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed, "mfu": mfu}
        self.row(step=step, train_loss=loss, **figures)
        if self.board:
            self.board.scalars(step, {"loss/batch": loss, **figures})
        if not self.warned and self.process.device.type == "cpu" and left > 3600:
            self.line(
                f"this will take about {left / 3600:.1f} hours on this CPU; "
                "python train.py config/shakespeare_char_cpu.py takes two minutes"
            )
        self.warned = True

    def line(self, text: str, stays: bool = True) -> None:
        """Print a line; on a terminal, the next one takes its place if it does not stay."""
        if self.process.rank:
            return
        if self.open_width:
            print(" " * self.open_width, end="\r", file=self.progress_stream, flush=True)
            self.open_width = 0
        if stays:
            print(text, flush=True)
        elif self.progress_stream.isatty():
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be replaced
            self.open_width = len(text)
            print(text, end="\r", file=self.progress_stream, flush=True)
        else:
            print(text, file=self.progress_stream, flush=True)

    def row(self, **figures: float | None) -> None:
        if self.path:
            figures["seconds"] = round(time.perf_counter() - self.started, 3)
            values = (figures.get(column) for column in self.COLUMNS)
            cells = (
                "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value) for value in values
            )
            with open(self.path, "a", newline="") as file:
                file.write(",".join(cells) + "\n")


class Board:
    """The figures of the log, the settings and a sample at each evaluation, as events that TensorBoard shows."""

    def __init__(self, config: TrainConfig, state: State):
        self.state, self.seed = state, config.seed
        try:
            self.tokenizer = tokenizer_of(state.tokenizer)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"data/{config.dataset}/meta.json has no usable tokenizer: {error}") from None
        self.writer = extra("torch.utils.tensorboard").SummaryWriter(
            config.out_dir,
            purge_step=state.step + 1 if state.step else 0,  # what an older run did after this step
        )
        self.text("config", "\n".join(f"{name} = {value!r}" for name, value in state.settings(config).items()))

    def text(self, name: str, text: str) -> None:
        as_it_is = "\n".join(f"    {line}" for line in text.split("\n"))  # TensorBoard reads Markdown
        self.writer.add_text(name, as_it_is, self.state.step)

    def scalars(self, step: int, figures: dict[str, float | None]) -> None:
        for name, value in figures.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def sample(self, step: int) -> None:
        """What the model writes by now, 200 tokens."""
        device = next(self.state.model.parameters()).device
        chance = torch.Generator(device).manual_seed(self.seed)
        start = torch.tensor([[first_token(self.tokenizer)]], device=device)
        tokens = self.state.model.generate(start, 200, temperature=0.8, generator=chance)
        self.text("sample", self.tokenizer.decode(tokens[0].cpu().numpy()))
        self.writer.flush()


def flops_per_token(model: LanguageModel, block_size: int) -> int:
    """Floating-point operations of training on one token: 6 a weight, 12 T C an attention (PaLM, appendix B)."""
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    attentions = sum(isinstance(module, CausalSelfAttention) for module in model.modules())
    return 6 * weights + 12 * attentions * block_size * model.config.n_embd


def peak_flops(process: Process) -> float | None:
    """What all processes' devices can do in a second at best, where that is known."""
    if process.device.type != "cuda" or process.dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(process.device)
    peaks = [peak * process.world_size for card, peak in PEAK_FLOPS.items() if card in name and "MIG" not in name]
    return peaks[0] if peaks else None


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


if __name__ == "__main__":
    run(main)
