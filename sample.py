"""What a model says: a checkpoint and a prompt in, text out.

Reads out_dir and nothing else: a checkpoint carries its tokenizer.

    python sample.py --out_dir=out --start="ROMEO:"
    python sample.py --out_dir=out --start=FILE:prompt.txt --num_samples=5 --temperature=0.8
    python sample.py --init_from=gpt2 --start="The answer is"
    python sample.py --out_dir=out --save_pretrained=FOLDER      the model for Hugging Face's transformers, instead
"""

import json
import signal
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

# While torch is loaded, Ctrl-C just ends the program; then `run` sees to it. What ignores it goes on ignoring it.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from torch import Tensor, nn

from config import ConfigError, UserError, key, read, run
from model import GPT, FeedForward, LanguageModel
from prepare import Tokenizer, decoded_stream, first_token, tokenizer_of
from train import check_source, choose_device, keep_freed_memory, pretrained


@dataclass
class SampleConfig:
    """Continue a text with a trained model."""

    out_dir: str = key("out", "folder of the checkpoint: best.pt, or ckpt.pt where there is none")
    init_from: str | None = key(
        None,
        "instead of out_dir's: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder in Hugging Face's format, a checkpoint",
    )
    save_pretrained: str | None = key(None, "write the model to this folder in Hugging Face's format, and no text")
    start: str | None = key(
        None, "the text to continue, or FILE:path of one; None: a line break, or what comes closest"
    )
    num_samples: int = key(1, "continuations, generated as one batch")
    max_new_tokens: int = key(500, "tokens in each of them")
    temperature: float = key(0.8, "below 1 safer, above 1 wilder; 0: always the likeliest token")
    top_k: int | None = key(None, "choose among the k likeliest tokens only")
    top_p: float | None = key(None, "choose among the fewest tokens that hold this share of probability")
    seed: int = key(1337, "the same seed gives the same text")
    device: str = key("auto", "cuda, cuda:N, mps or cpu; auto: the first of them that is there")

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0, or at least 0.001 and finite, found {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, found {self.seed}")
        if self.save_pretrained == "":
            raise ValueError("save_pretrained is empty: it must name a folder")
        if self.init_from:
            check_source(self.init_from)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")


@torch.inference_mode()  # a tenth faster than the no_grad of `stream`
def main(argv: list[str]) -> None:
    config = read(SampleConfig, argv)
    device = choose_device(config.device)
    model, tokenizer = load(config)
    if config.save_pretrained:
        return save_pretrained(model, tokenizer, config.save_pretrained)
    model.to(device)
    if device.type == "cpu":
        keep_freed_memory()
        pack(model)
    idx = torch.from_numpy(prompt(config.start, tokenizer)).to(device).repeat(config.num_samples, 1)  # (num_samples, T)
    choices = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "generator": torch.Generator(device).manual_seed(config.seed),
    }
    if config.num_samples == 1:  # appears as it is made
        tokens = chain(idx[0].tolist(), (token.item() for token in model.stream(idx, config.max_new_tokens, **choices)))
        for text in decoded_stream(tokenizer, tokens):
            print(text, end="", flush=True)
        print()
    else:
        texts = (tokenizer.decode(row) for row in model.generate(idx, config.max_new_tokens, **choices).cpu().numpy())
        print("\n---------------\n".join(texts))


def load(config: SampleConfig) -> tuple[LanguageModel, Tokenizer]:
    """The model of `init_from`, or of the checkpoint in out_dir, and its tokenizer."""
    source = config.init_from or find_checkpoint(Path(config.out_dir))
    model, facts = pretrained(source)
    if not facts:  # Hugging Face's format
        file = Path(source) / "tokenizer.json"
        facts = {"tokenizer": "gpt2"}
        if Path(source).exists():
            facts = {"tokenizer": str(file), "json": file.read_text(encoding="utf-8")}
    try:
        tokenizer = tokenizer_of(facts)
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(f"{tokenizer.vocab_size} tokens for a vocabulary of {model.config.vocab_size}")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source} has no usable tokenizer ({type(error).__name__}: {error})") from None
    return model, tokenizer


def save_pretrained(model: LanguageModel, tokenizer: Tokenizer, folder: str) -> None:
    """Write what transformers opens with AutoModelForCausalLM and AutoTokenizer; each file takes its place whole."""
    if not isinstance(model, GPT):
        raise UserError("only a GPT can be saved in Hugging Face's format, this is a bigram table")
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as beside:
        try:
            model.save_pretrained(beside)
            tokenizer.to_library().save(str(Path(beside) / "tokenizer.json"))
            (Path(beside) / "tokenizer_config.json").write_text(json.dumps(facts))
        except (UserError, OSError):
            raise
        except Exception as error:  # a full disk has another name in every library
            raise UserError(f"cannot write {folder}: {error}") from None
        for file in Path(beside).iterdir():
            file.replace(Path(folder) / file.name)
    print(f'{folder}: open it with transformers.pipeline("text-generation", model="{folder}")')


class PackedLinear(nn.Module):
    """A linear layer for reading only, its weights in the order in which oneDNN, torch's CPU library, reads them.

    The reference model then writes one text 1.8 times as fast, ten at once 1.7 times.
    """

    def __init__(self, linear: nn.Linear, activation: str = "none"):
        super().__init__()
        self.activation = activation
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "tanh")


def pack(model: nn.Module) -> None:
    """Pack every linear layer of the model, where this torch can."""
    if not torch.backends.mkldnn.is_available():
        return
    for name, module in model.named_children():
        if isinstance(module, FeedForward):  # GELU with the product: ten texts at once a tenth faster
            module.c_fc, module.gelu = PackedLinear(module.c_fc, "gelu"), nn.Identity()
            module.c_proj = PackedLinear(module.c_proj)
        elif isinstance(module, nn.Linear):
            setattr(model, name, PackedLinear(module))
        else:
            pack(module)


def find_checkpoint(out_dir: Path) -> Path:
    for path in (out_dir / "best.pt", out_dir / "ckpt.pt"):
        if path.exists():
            return path
    others = sorted({path.parent.as_posix() for path in Path("out").rglob("*.pt")})
    hint = f"there is one in {', '.join(others)}" if others else "python train.py makes one"
    raise ConfigError(f"there is no checkpoint in {out_dir}; {hint}")


def prompt(start: str | None, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids (T,) of the text to continue. Raises ConfigError for one that cannot be read."""
    if start is None:
        return np.array([first_token(tokenizer)])
    if start.startswith("FILE:"):
        try:
            start = Path(start.removeprefix("FILE:")).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--start={start}: {error}") from None
    if not start:
        raise ConfigError("--start is empty: the model needs at least one token to continue")
    try:
        return tokenizer.encode(start).astype(np.int64)
    except ValueError as error:
        raise ConfigError(f"--start: {error}") from None


if __name__ == "__main__":
    run(main)
