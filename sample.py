"""Generate text with a trained model: a checkpoint and a prompt in, text out.

A checkpoint carries its tokenizer, so the model's folder is all that is needed; only for nanoGPT's checkpoints,
data/<dataset>/meta.json is read, too.

    python sample.py --out_dir=out --start="ROMEO:"
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=5 --temperature=0.8
    python sample.py --init_from=gpt2 --start="The answer is"
    python sample.py --out_dir=out --save_pretrained=FOLDER      the model for Hugging Face's transformers, instead
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import prepare
from config import ConfigError, UserError, as_config_error, explained, key, put, read, run
from model import GPT, LanguageModel, checkpoint_in, choose_device, choose_dtype, open_model
from prepare import Tokenizer


@dataclass
class SampleConfig:
    """Continue a text with a trained model."""

    out_dir: str = key("out", "folder of the checkpoint: best.pt, or ckpt.pt where there is none")
    init_from: str | None = key(
        None, "instead: gpt2 to gpt2-xl, a Hugging Face folder, a checkpoint", also="checkpoint model"
    )
    save_pretrained: str | None = key(None, "write the model to this folder in Hugging Face's format, and no text")
    start: str | None = key(None, r"text to continue (\n: newline), or FILE:path of it; None: a newline", also="prompt")
    num_samples: int = key(1, "continuations, generated as one batch", least=1)
    max_new_tokens: int = key(500, "tokens in each of them", also="length", least=1)
    temperature: float = key(0.8, "below 1 safer, above 1 wilder; 0: always the likeliest token", least=0)
    top_k: int | None = key(None, "choose among the k likeliest tokens only", least=1)
    top_p: float | None = key(None, "choose among the fewest tokens with this total probability", above=0, most=1)
    stop_at_end: bool = key(True, "end a text at the token that ends one, <|endoftext|> in GPT-2, where there is one")
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
    with as_config_error():
        device = choose_device(config.device)
    model, tokenizer, which = open_trained(config.init_from or config.out_dir)
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
    """Token ids (1, T) of what --start says, by default a newline, or else token 0.

    Raises ConfigError for a text that cannot be read or encoded.
    """
    if start is None:
        with suppress(UserError, ValueError):  # a vocabulary may lack it
            return encoded("\n", tokenizer)
        return torch.tensor([[0]])
    try:
        if start.startswith("FILE:"):
            text = "".join(prepare.read_pieces(Path(start.removeprefix("FILE:")).expanduser()))
        else:
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


def open_trained(source: str | Path) -> tuple[LanguageModel, Tokenizer, str]:
    """A trained model, on the CPU, its tokenizer, and what to say of where they are from. Raises UserError."""
    with as_config_error():
        path = checkpoint_in(source)
    if path is None:
        prepare.quiet_hub(needed=not Path(source).exists())
    with explained(f"cannot open {path or source}", "; restore a copy, or name another one"):
        model, checkpoint = open_model(path or source)
    with explained(f"{path or source} has no usable tokenizer"):
        facts = prepare.file_facts(Path(path or source)) if Path(source).exists() else prepare.GPT2_FACTS
        tokenizer = prepare.tokenizer_of(facts)
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} tokens for a vocabulary of {model.config.vocab_size}")
    return model, tokenizer, f"{path}, step {checkpoint['step']}" if path else f"{source}"


# The files of an export, and the names of what else transformers reads in a folder.
WRITTEN = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
READ = (
    r"(special_tokens_map|added_tokens|vocab|chat_template|adapter_config)\.json|(merges|vocab)\.txt"
    r"|.*\.(safetensors|model|jinja|index\.json)|(pytorch|adapter)_model.*\.bin|additional_chat_templates"
)


def save_pretrained(model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what transformers opens with AutoModelForCausalLM and AutoTokenizer. Raises UserError."""
    if not isinstance(model, GPT):
        raise UserError("only a GPT can be saved in Hugging Face's format, this is a bigram table")
    if others := sorted({path.name for path in folder.glob("*") if re.fullmatch(READ, path.name)} - WRITTEN):
        raise ConfigError(f"{folder} holds other files that transformers reads: {', '.join(others)}; take another one")
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.end is not None:
        facts |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.facts["end"])
    with explained(f"cannot write {folder}"):
        model.config.require_gpt2()  # before anything is replaced
        folder.mkdir(parents=True, exist_ok=True)
        library = tokenizer.to_library()
        (folder / "config.json").unlink(missing_ok=True)  # it is written last: a folder that has one is complete
        library.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(facts))
        model.save_pretrained(folder, tokenizer.end)
    print(f'{folder}: open it with transformers.pipeline("text-generation", model="{folder}")')


# From Python


def load(source: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """A trained model and its tokenizer: `source` as for `open_model` of model.py. Raises UserError."""
    return open_trained(source)[:2]


def write(model: LanguageModel, tokenizer: Tokenizer, text: str, max_new_tokens: int = 500, **choice: object) -> str:
    """`text` and its continuation; `choice` is passed to `model.generate`. Raises ValueError for a wrong text."""
    idx = encoded(text, tokenizer).to(next(model.parameters()).device)
    return tokenizer.decode(model.generate(idx, max_new_tokens, **choice)[0].cpu().numpy())


if __name__ == "__main__":
    run(main)
