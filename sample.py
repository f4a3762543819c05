"""Generate text with a trained model: a checkpoint and a prompt in, text out.

A checkpoint carries its tokenizer, so the model's folder is all that is needed; only for nanoGPT's checkpoints,
data/<dataset>/meta.json is read, too. train.py also opens models by `open_model`.

    python sample.py --out_dir=out --start="ROMEO:"
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=5 --temperature=0.8
    python sample.py --init_from=gpt2 --start="The answer is"
    python sample.py --out_dir=out --save_pretrained=FOLDER      the model for Hugging Face's transformers, instead
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Ctrl-C during the imports shows no traceback
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

import ctypes
import json
import math
import os
import re
import zipfile
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from reprlib import repr as short
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import prepare
from config import ConfigError, UserError, did_you_mean, explained, key, put, read, run, typed
from model import GPT, MODELS, GPTConfig, LanguageModel, load_weights
from prepare import Tokenizer

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TOKENIZER_FACTS = ("tokenizer", "vocab_size", "chars", "json")  # of meta.json; a checkpoint has them, too


@dataclass
class SampleConfig:
    """Continue a text with a trained model."""

    other_names = MappingProxyType({
        "prompt": "it is --start", "length": "it is --max_new_tokens", "model": "it is --init_from",
        "checkpoint": "it is --init_from", "compile": "only train.py compiles",
    })  # fmt: skip

    out_dir: str = key("out", "folder of the checkpoint: best.pt, or ckpt.pt where there is none")
    init_from: str | None = key(None, "instead: gpt2, gpt2-medium, ..., a folder of Hugging Face's, a checkpoint")
    save_pretrained: str | None = key(None, "write the model to this folder in Hugging Face's format, and no text")
    start: str | None = key(
        None, r"text to continue (\n: newline, \\: backslash), or FILE:path of it; None: a newline, else token 0"
    )
    num_samples: int = key(1, "continuations, generated as one batch", least=1)
    max_new_tokens: int = key(500, "tokens in each of them", least=1)
    temperature: float = key(0.8, "below 1 safer, above 1 wilder; 0: always the likeliest token", least=0)
    top_k: int | None = key(None, "choose among the k likeliest tokens only", least=1)
    top_p: float | None = key(None, "choose among the fewest tokens with this total probability", above=0, most=1)
    stop_at_end: bool = key(True, f"end a text at {prepare.END}, where the tokenizer has it as a token of its own")
    seed: int = key(1337, "the same seed gives the same text", least=0, below=2**63)
    device: str = key("auto", "cuda, cuda:N, mps or cpu; auto: the first that is available")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "of the weights; auto: bfloat16 on cuda (float16 where a card lacks it), elsewhere float32"
    )

    def __post_init__(self):
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0 or at least 0.001, found {self.temperature}")
        if self.save_pretrained == "":
            raise ValueError("save_pretrained is empty: it must name a folder")


def main(argv: list[str]) -> None:
    config = read(SampleConfig, argv)
    device = choose_device(config.device)
    source = config.init_from or config.out_dir
    model, checkpoint = open_model(source)
    tokenizer = tokenizer_for(model, checkpoint, source)
    which = f"{checkpoint_in(source)}, step {checkpoint['step']}" if checkpoint else source
    if config.save_pretrained:
        put(f"{which}\n", sys.stderr)
        return save_pretrained(model, tokenizer, Path(config.save_pretrained))
    idx = prompt(config.start, tokenizer).to(device).repeat(config.num_samples, 1)  # (num_samples, T)
    if device.index:
        torch.cuda.set_device(device)  # choose_dtype asks about this one
    dtype = choose_dtype(config.dtype, device)
    put(f"{which}, on {device}, {str(dtype).removeprefix('torch.')}\n", sys.stderr)
    model.to(device, dtype)
    generator = torch.Generator(device).manual_seed(config.seed)
    stream = model.stream(idx, config.max_new_tokens, None, config.temperature, config.top_k, config.top_p, generator)
    end = tokenizer.end if config.stop_at_end else None
    if config.num_samples == 1:  # appears as it is made
        new = takewhile(lambda id: id != end, (token.item() for token in stream))
        for text in prepare.decoded_stream(tokenizer, chain(idx[0].tolist(), new)):
            print(text, end="", flush=True)
        print()
    else:
        T, rows = idx.size(1), torch.cat((idx, *stream), dim=1).cpu().numpy()  # (num_samples, T + max_new_tokens)
        lengths = [T + [*row[T:], end].index(end) for row in rows]
        print("\n---------------\n".join(tokenizer.decode(row[:n]) for row, n in zip(rows, lengths, strict=True)))


def prompt(start: str | None, tokenizer: Tokenizer) -> Tensor:
    """Token ids (1, T) of what --start says. Raises ConfigError for a text that cannot be read or encoded."""
    if start is None:
        return torch.tensor([[prepare.first_token(tokenizer)]])
    try:
        if start.startswith("FILE:"):
            text = "".join(prepare.read_pieces(Path(start.removeprefix("FILE:")).expanduser()))
        else:
            if os.path.isfile(start):
                put(f"{start} is a file; {typed('start', f'FILE:{start}')} continues its text\n", sys.stderr)
            text = re.sub(r"\\([n\\])", lambda match: "\n" if match[1] == "n" else "\\", start)
        return encoded(text, tokenizer)
    except (UserError, OSError, ValueError, RuntimeError) as error:  # the last: ~ without a home
        raise ConfigError(f"--start: {error}") from None


def encoded(text: str, tokenizer: Tokenizer) -> Tensor:
    """Token ids (1, T). Raises ValueError for a text without tokens and one outside the vocabulary."""
    ids = tokenizer.encode(text)
    if not len(ids):
        raise ValueError("the model needs at least one token to continue, found an empty text")
    return torch.from_numpy(ids.astype(np.int64))[None]


# From Python


def load(source: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """A trained model and its tokenizer, from what `open_model` takes. Raises UserError."""
    model, checkpoint = open_model(source)
    return model, tokenizer_for(model, checkpoint, source)


def write(model: LanguageModel, tokenizer: Tokenizer, text: str, max_new_tokens: int = 500, **choice: object) -> str:
    """`text` and its continuation; `choice` is passed to `model.generate`. Raises ValueError for a wrong text."""
    idx = encoded(text, tokenizer).to(next(model.parameters()).device)
    return tokenizer.decode(model.generate(idx, max_new_tokens, **choice)[0].cpu().numpy())


# Open a model


def tokenizer_for(model: LanguageModel, checkpoint: dict, source: str | Path) -> Tokenizer:
    """The tokenizer of what `open_model` has opened. Raises UserError for one that does not fit."""
    source = checkpoint_in(source) or source
    with explained(f"{source} has no usable tokenizer"):
        facts = checkpoint.get("tokenizer", {"tokenizer": "gpt2"})
        if not checkpoint and Path(source).exists():
            facts = prepare.tokenizer_facts(Path(source))
        tokenizer = prepare.tokenizer_of(facts)
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} tokens for a vocabulary of {model.config.vocab_size}")
    return tokenizer


def open_model(source: str | Path, dropout: float = 0.0) -> tuple[LanguageModel, dict]:
    """The model, on the CPU, of a checkpoint, and what else the checkpoint holds; runs no code of it.

    `source`: a checkpoint of train.py or nanoGPT, a folder with one, or weights in Hugging Face's format, which hold
    nothing else: a folder or one of GPT2_NAMES. Raises UserError for one that is missing, damaged or does not fit.
    """
    path = checkpoint_in(source)
    if path is None:
        prepare.quiet_hub(needed=not Path(source).exists())
        with explained(f"cannot load {source}", "" if Path(source).exists() else "; a folder needs no network"):
            return GPT.from_pretrained(source, dropout), {}
    with usable(path):
        with zipfile.ZipFile(path) as container:
            if damaged := container.testzip():  # torch itself does not look at the checksums
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        wrappers = r"^((module|_orig_mod)\.)+"  # DistributedDataParallel and torch.compile put these before names
        checkpoint["model"] = {re.sub(wrappers, "", name): weight for name, weight in checkpoint["model"].items()}
        if "model_args" in checkpoint:
            checkpoint = from_nanogpt(checkpoint)
        build, weights = MODELS[checkpoint["config"]["model"]], checkpoint["model"]
        config = GPTConfig(**checkpoint["model_config"] | {"dropout": dropout})
        with torch.device("meta"):  # takes no memory, whatever sizes a damaged config has
            model = build(replace(config, n_layer=min(config.n_layer, len(weights))))
        expected = {"format": 1, "model": model.state_dict(), "model_config": asdict(GPTConfig(1, 1, 1, 1, 1))}
        expected |= {"step": 0, "best_val_loss": 0.0}
        found = checkpoint | {"model_config": asdict(config)}
        if wrong := [name for name in expected if shapes_and_types(found[name]) != shapes_and_types(expected[name])]:
            raise ValueError(f"its {' and '.join(wrong)} must have other names, types or shapes")
        names = ("format", "step", "best_val_loss", "tokenizer")
        version, step, loss, tokenizer = map(checkpoint.get, names)
        if version != 1 or step < 0 or math.isnan(loss) or not isinstance(tokenizer, dict):
            raise ValueError(", ".join(f"{name} {short(checkpoint[name])}" for name in names))
        model = build(config)
        load_weights(model, weights)
        return model, checkpoint


def checkpoint_in(source: str | Path, other_names: tuple[str, ...] = ()) -> Path | None:
    """The checkpoint that `source` is or holds; None for weights in Hugging Face's format. Raises ConfigError."""
    for path in (Path(source) / "best.pt", Path(source) / "ckpt.pt", Path(source)):
        if path.is_file():
            return path
    if source in GPT2_NAMES or (Path(source) / "config.json").is_file():
        return None
    others = sorted({path.parent.as_posix() for path in Path("out").rglob("*.pt")})
    hint = f"; there is one in {', '.join(others)}" if others else "; python train.py makes one"
    hint = did_you_mean(str(source), (*other_names, *GPT2_NAMES)) or hint
    raise ConfigError(f"there is no checkpoint in {source}{hint}")


def usable(path: str | Path) -> AbstractContextManager:
    """Turns any exception that the content of a checkpoint raises into one line."""
    advice = "; restore a copy, or train in another --out_dir; for a Hugging Face model, name its folder"
    return explained(f"{path} is not a usable checkpoint", advice)


def shapes_and_types(value: Any) -> Any:
    """Names, types, shapes and dtypes of nested dicts and lists of tensors and plain values, without the values."""
    if isinstance(value, dict):
        return {name: shapes_and_types(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [*map(shapes_and_types, value)]
    return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)


def from_nanogpt(theirs: dict) -> dict:
    """A checkpoint of nanoGPT in the form of ours, without its optimizer. It does not say what its tokens mean."""
    shape, weights, dataset = theirs["model_args"], theirs["model"], theirs["config"]["dataset"]
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}  # an old mask
    if shape["vocab_size"] == 50304:  # GPT-2's 50,257 tokens rounded up for speed: the rest never occurs
        shape = shape | {"vocab_size": 50257}
        weights |= {name: weights[name][:50257] for name in ("transformer.wte.weight", "lm_head.weight")}
    path = prepare.dataset_folder(dataset) / "meta.json"
    meta = prepare.load_meta(dataset) if path.exists() else prepare.GPT2_FACTS
    if meta["vocab_size"] != shape["vocab_size"]:
        problem = f"{path} has {meta['vocab_size']}" if path.exists() else f"{path} is missing"
        way = f"python prepare.py {typed('dataset', dataset)} --input=FILE makes it from the text it was trained on"
        raise UserError(f"this checkpoint of nanoGPT has {shape['vocab_size']} tokens, but {problem}: {way}")
    return {
        "format": 1,
        "model": weights,
        "model_config": shape,
        "step": theirs["iter_num"],
        "best_val_loss": float(theirs["best_val_loss"]),
        "config": {"model": "gpt"},
        "tokenizer": {name: meta[name] for name in TOKENIZER_FACTS if name in meta},
    }


def save_pretrained(model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what transformers opens with AutoModelForCausalLM and AutoTokenizer."""
    if not isinstance(model, GPT):
        raise UserError("only a GPT can be saved in Hugging Face's format, this is a bigram table")
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.end is not None:
        facts |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), prepare.END)
    with explained(f"cannot write {folder}"):
        model.config.require_gpt2()  # before anything is replaced
        folder.mkdir(parents=True, exist_ok=True)
        library = tokenizer.to_library()
        (folder / "config.json").unlink(missing_ok=True)  # it is written last: a folder that has one is complete
        library.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(facts))
        model.save_pretrained(folder, tokenizer.end)
    print(f'{folder}: open it with transformers.pipeline("text-generation", model="{folder}")')


# Devices


def choose_device(name: str, processes: int = 1) -> torch.device:
    """The device `name`, or the best available one, for each of so many processes. Raises ConfigError."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes > 1:  # one GPU each, or gloo on CPUs; no backend connects processes on mps
        available = ["cuda"] * (gpus >= processes) + ["cpu"]
    else:
        mps = torch.backends.mps.is_available()
        available = ["cuda"] * bool(gpus) + ["mps"] * mps + ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    if name not in (*available, "auto"):
        each = f" for each of {processes} processes" if processes > 1 else ""
        hint = "; a GPU is called cuda" if name.startswith("gpu") else ""
        raise ConfigError(f"device {name!r} is not available{each}; available: {', '.join(available)}{hint}")
    device = torch.device(available[0] if name == "auto" else name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype `name`; auto: float32, or on cuda the one of 16 bits that the card has."""
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return getattr(torch, "float32" if name == "auto" else name)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free; otherwise the OS takes it back and zeroes it again in every step.

    A step of config/shakespeare_char_cpu.py takes 26 ms instead of 33, one of the reference model a tenth less.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # musl has none
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large tensor


if __name__ == "__main__":
    run(main)
