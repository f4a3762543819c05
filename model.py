"""The network: a GPT, and the bigram table that it grows out of. Token ids in, logits out.

This file knows nothing of text or training, and needs torch alone, so it can be copied into any project. It goes from
the parts to the whole: attention, feed-forward, block; what all language models share; GPT and Bigram. At the end:
weights in files, and devices.

Shapes: B sequences in a batch, T tokens in each, C = n_embd channels.
"""

from __future__ import annotations

import copy
import ctypes
import math
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**28  # of float32 in memory at a time, where the loss is wanted without them: a gigabyte
TENSOR_CORES = ("cuda",)  # devices whose matrix products are fast at widths that are multiples of 64


@dataclass
class GPTConfig:
    """The shape of a GPT. Raises ValueError for one that cannot be built."""

    vocab_size: int
    block_size: int  # the longest context, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and layer norms, as GPT-2 has them
    feed_forward: bool = True  # the parts that the lecture adds one by one
    residual: bool = True
    layer_norm: bool = True

    def __post_init__(self):
        for name, least in (("vocab_size", 1), ("block_size", 1), ("n_layer", 0), ("n_head", 1), ("n_embd", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, found {self.dropout}")

    def require_gpt2(self) -> None:
        """Raises ValueError where a part of GPT-2 is left out."""
        if not (self.feed_forward and self.residual and self.layer_norm):
            raise ValueError("only a whole GPT can be saved as GPT-2, with feed_forward, residual and layer_norm")


class KVCache:
    """Keys and values of the tokens that one attention layer has read, so that the next token is all it must read."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0
        self.kv = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, n_head, T, head_size) of T new tokens; return those of all tokens so far."""
        if self.kv is None:
            B, n_head, _, head_size = k.shape
            self.kv = k.new_empty(2, B, n_head, self.max_length, head_size)
        new = slice(self.length, self.length + k.size(2))
        self.kv[0, :, :, new], self.kv[1, :, :, new] = k, v
        self.length = new.stop
        return self.kv[:, :, :, : self.length].unbind()


def attention(q: Tensor, k: Tensor, v: Tensor, p_dropout: float = 0.0) -> Tensor:
    """Attention written out; all are (B, n_head, T, head_size).

    For training on CPUs in bfloat16 or with dropout: forward and backward take half the time of torch's fused call,
    with dropout a quarter (16 x 6 x 256 x 64, torch 2.13), but keep B * n_head matrices of T x T in memory. In float32
    without dropout the fused call is faster, by a tenth.
    """
    weights = dropout(causal_weights(q, k), p_dropout)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(q.shape)


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_size), future masked): (B, n_head, T, T) of two (B, n_head, T, head_size).

    Masked, because a token must not see the answer; divided, because a sum of head_size products would otherwise grow
    with head_size and push the softmax towards one-hot.
    """
    B, n_head, T, head_size = q.shape
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)  # 0 where a token may look
    scores = torch.baddbmm(future, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=1 / math.sqrt(head_size))
    return scores.softmax(-1).view(B, n_head, T, T)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero a share `p` of x and enlarge the rest, so that the mean stays (Srivastava et al., 2014).

    On a CPU, torch draws a number for each value. Here each has 16 random bits, drawn for four values at once: a third
    of the time, forward and backward together (16 x 6 x 256 x 256). p is rounded to a multiple of 2^-16.
    """
    if not p or x.device.type != "cpu" or torch.compiler.is_compiling():  # a compiler fuses its own
        return F.dropout(x, p)
    random_bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    random_bits = random_bits.view(torch.int16)[: x.numel()].view(x.shape)
    return x * (random_bits >= min(round(p * 2**16), 2**16 - 1) - 2**15).to(x.dtype) / (1 - p)


class CausalSelfAttention(nn.Module):
    """Tokens exchange information: each gathers, by its own question, from those before it (Vaswani et al., 2017).

    Multi-head: n_head heads attend in parallel, each in its own channels, each to something else.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def qkv(self, x: Tensor) -> Tensor:
        """Query: what am I looking for? Key: what do I contain? Value: what do I tell if you attend to me?"""
        qkv = self.c_attn(x).unflatten(-1, (3, self.config.n_head, -1))  # (B, T, 3C) -> (B, T, 3, n_head, head_size)
        return qkv.permute(2, 0, 3, 1, 4)  # three of (B, n_head, T, head_size)

    def forward(self, x: Tensor, position: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). `position` (T,) is where each token stands: x knows, rotary embeddings would ask."""
        B, T, C = x.shape
        q, k, v = self.qkv(x)
        if cache is not None:
            k, v = cache.extend(k, v)
        p = self.config.dropout * self.training
        if self.training and x.device.type == "cpu" and (p or q.dtype == torch.bfloat16):
            y = attention(q, k, v, p)
        else:  # the same in one fused call that never stores the T x T matrix; a lone token is the last: it sees all
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # the heads side by side again, then mixed


class FeedForward(nn.Module):
    """Each token, by itself, thinks about what it has gathered. GELU in GPT-2's tanh form."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU("tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


def layer_norm(config: GPTConfig) -> nn.Module:
    return nn.LayerNorm(config.n_embd, bias=config.bias) if config.layer_norm else nn.Identity()


class Block(nn.Module):
    """Communication, then computation, each adding to what is there: x + f(norm(x)).

    The residual sum gives gradients a straight way from the loss to every layer (He et al., 2015); the norm comes
    before each part, so that nothing stands in that way (Radford et al., 2019).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = layer_norm(config) if config.feed_forward else None
        self.mlp = FeedForward(config) if config.feed_forward else None

    def forward(self, x: Tensor, position: Tensor, cache: KVCache | None = None) -> Tensor:
        p = self.config.dropout * self.training
        # Residual: x is kept, a part's output is added. Pre-norm: what a part reads is normalized, not x itself.
        x = (x if self.config.residual else 0) + dropout(self.attn(self.ln_1(x), position, cache), p)
        if self.mlp is not None:
            x = (x if self.config.residual else 0) + dropout(self.mlp(self.ln_2(x)), p)
        return x


class LanguageModel(nn.Module):
    """What GPT and Bigram share: the loss and generation. A subclass has `hidden`, `lm_head` and `config`."""

    blocks = ()  # those that attend: each gets a cache

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, need_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict every next token.

        `idx` and `targets` are token ids (B, T), T at most block_size; the targets are the inputs shifted by one, so
        that every position is a training example. Returns the logits (B, T, vocab_size) and the mean cross-entropy in
        nats per token, or None without targets. need_logits=False: None and the same loss, computed a few sequences at
        a time: of a large vocabulary, neither float32 logits nor gradients are then all in memory at once.
        """
        x = self.hidden(idx)
        if targets is None or need_logits:
            logits = self.lm_head(x)
            return logits, None if targets is None else cross_entropy(logits, targets)
        rows = max(1, MAX_LOGITS // (idx.size(1) * self.config.vocab_size))
        chunks = zip(x.split(rows), targets.split(rows), strict=True)
        # A chunk's logits are kept, in autocast's dtype; the backward pass computes their float32 softmax again.
        recomputed = partial(checkpoint, cross_entropy, use_reentrant=False, preserve_rng_state=False)
        chunk_loss = recomputed if len(idx) > rows else cross_entropy
        # Not a mean of means: a chunk may have fewer targets than another, or none.
        return None, sum(chunk_loss(self.lm_head(x), target, "sum") for x, target in chunks) / (targets != -100).sum()

    @torch.no_grad()
    def initialize(self):
        """Normal weights of std 0.02, as in GPT-2, whose smallest model has 768 channels.

        Narrower blocks get larger ones, so that a sum over fewer channels is as large: 1500 steps of
        config/shakespeare_char_cpu.py with AdamW, 128 channels wide, ended at 1.617 instead of 1.637. Weights that end
        a block's parts are divided by sqrt(2 n_layer), for that many add up on the residual path (GPT-2, section 2.3).
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 * math.sqrt(max(1, 768 / self.config.n_embd)) if ".h." in name else 0.02
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                parameter.normal_(std=std)
            elif name.endswith("bias"):
                parameter.zero_()

    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token: 6 per weight, 12 T C per attention (PaLM, appendix B)."""
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return 6 * weights + 12 * len(self.blocks) * self.config.block_size * self.config.n_embd

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stride: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each row of `idx` (B, T), T at least 1: (B, T + max_new_tokens).

        temperature: divides the logits; 0 always takes the likeliest token. top_k: draw from the k likeliest (Fan et
        al., 2018). top_p: from the fewest that hold this share of probability (Holtzman et al., 2019). generator: the
        source of chance, on idx's device.

        Past block_size the window slides: the oldest `stride` tokens go and the rest is read anew, at new positions.
        stride=1 crops at every token, as the lecture does; the default, block_size // 4, costs a fraction of it.
        """
        new = self.stream(idx, max_new_tokens, stride, temperature, top_k, top_p, generator)
        return torch.cat((idx, *new), dim=1)

    @torch.inference_mode()
    def stream(self, idx: Tensor, max_new_tokens: int, stride: int | None = None, *choice: object) -> Iterator[Tensor]:
        """As `generate`, but yield each new token (B, 1) as it is drawn; `choice`: `sample_token`'s other arguments.

        Weights must not change before the last token. The tokens are inference tensors: to train on them, clone them.
        """
        if not idx.size(1):
            raise ValueError("there must be at least one token to continue")
        block_size = self.config.block_size
        stride = max(1, block_size // 4) if stride is None else stride
        if not 1 <= stride <= block_size:
            raise ValueError(f"stride must be from 1 to block_size ({block_size}), found {stride}")
        model = in_eval_mode(self)
        window, caches = idx[:, -block_size:], None  # crop: no embedding of a position beyond block_size
        for _ in range(max_new_tokens):
            if window.size(1) > block_size:
                window, caches = window[:, stride:], None
            if caches is None:
                unread, caches = window, [KVCache(block_size) for _ in self.blocks]
            x = model.hidden(unread, window.size(1) - unread.size(1), caches)
            unread = sample_token(model.lm_head(x[:, -1]), *choice)
            window = torch.cat((window, unread), dim=1)
            yield unread


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token (B, 1) from each row of logits (B, vocab_size), as `generate` says. Raises ValueError."""
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 <= top_p <= 1):
        raise ValueError("temperature must be at least 0, top_k at least 1, top_p from 0 to 1")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, tokens, vocab_size = logits.float() / temperature, None, logits.size(-1)
    if top_k or top_p is not None:  # sorting GPT-2's 50,257 takes 5 ms on two CPU cores
        logits, tokens = logits.topk(min(top_k or vocab_size, vocab_size))  # likeliest first
    probs = logits.softmax(-1)
    if top_p is not None:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill((before >= top_p) & (before > 0), 0)  # those before it already hold top_p
    # One draw as torch.multinomial makes it, which would also make the CPU wait for a GPU to check `probs`.
    drawn = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return drawn if tokens is None else tokens.gather(1, drawn)


class LMHead(nn.Linear):
    """From channels (B, T, C) to logits (B, T, vocab_size); for tensor cores, the vocabulary is padded on the way."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in TENSOR_CORES or x.dim() < 3:  # one token is not worth a copy of the table
            return super().forward(x)
        padded = F.pad(self.weight, (0, 0, 0, -self.out_features % 64))
        return F.linear(x, padded)[..., : self.out_features]


def in_eval_mode(module: nn.Module) -> nn.Module:
    """A copy in eval mode that shares parameters, buffers and hooks; the module itself may go on training meanwhile."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {name: child and in_eval_mode(child) for name, child in module._modules.items()}
    return twin


class GPT(LanguageModel):
    """Decoder-only Transformer. State-dict names are GPT-2's, so weights move to and from other programs by name."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),  # what a token is
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # where it stands: attention itself has no order
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": layer_norm(config),
            }
        )
        self.lm_head = LMHead(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one table reads and writes tokens (Press & Wolf, 2017)
        self.initialize()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    def embed(self, idx: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) from position `start` on -> what and where each of them is (B, T, C), positions (T,)."""
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size ({self.config.block_size})")
        position = torch.arange(start, end, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # (B, T, C) + (T, C)
        return dropout(x, self.config.dropout * self.training), position

    def hidden(self, idx: Tensor, start: int = 0, caches: list[KVCache] | None = None) -> Tensor:
        """Token ids (B, T) from position `start` on -> what the model makes of them (B, T, C).

        caches: one for each block, of the tokens before `start`; unless they are empty, T must be 1. Raises ValueError
        for another number of them, and for an attention that leaves its cache as it was.
        """
        x, position = self.embed(idx, start)
        for block, cache in zip(self.blocks, [None] * len(self.blocks) if caches is None else caches, strict=True):
            x = block(x, position, cache)
            if cache is not None and cache.length != start + idx.size(1):
                raise ValueError(f"{type(block.attn).__name__} must extend its cache by the tokens that it reads")
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def attention_weights(self, idx: Tensor) -> Tensor:
        """What each head attends to: (n_layer, B, n_head, T, T) for token ids (B, T); a row is one token's, sum 1."""
        model, weights = in_eval_mode(self), []
        x, position = model.embed(idx)
        for block in model.blocks:
            q, k, _ = block.attn.qkv(block.ln_1(x))
            weights.append(causal_weights(q, k))
            x = block(x, position)
        return torch.stack(weights)

    def crop(self, block_size: int) -> None:
        """Forget the positions from `block_size` on. Raises ValueError when there are not so many."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size ({block_size}) is more than the model's ({self.config.block_size})")
        self.config.block_size = block_size
        positions = self.transformer.wpe.weight[:block_size].clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(positions, freeze=False)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dropout: float = 0.0) -> GPT:
        """The weights of a GPT-2 in Hugging Face's format: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or a folder.

        Raises OSError when they cannot be loaded, ValueError for another architecture.
        """
        import transformers

        theirs = transformers.AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False)
        for name, expected in GPT2.items():
            if (found := getattr(theirs, name, None)) not in expected:
                raise ValueError(f"{name_or_folder} is not like GPT-2: its {name} is {found!r}, not {expected[0]!r}")
        if theirs.n_inner not in (None, 4 * theirs.n_embd):
            raise ValueError(f"{name_or_folder} is not like GPT-2: its n_inner is {theirs.n_inner}, not 4 n_embd")
        pretrained, report = transformers.GPT2LMHeadModel.from_pretrained(name_or_folder, output_loading_info=True)
        if report["missing_keys"] or report["mismatched_keys"]:  # which transformers initializes at random
            raise ValueError(f"{name_or_folder} has not all the weights that its config.json promises")
        masks = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"  # which GPT-2's old attention stored
        if unused := sorted(name for name in report["unexpected_keys"] if not re.fullmatch(masks, name)):
            names = ", ".join(unused[:2]) + f" and {len(unused) - 2} more" * (len(unused) > 2)
            raise ValueError(f"{name_or_folder} has weights that its config.json does not promise: {names}")
        sizes = (theirs.vocab_size, theirs.n_positions, theirs.n_layer, theirs.n_head, theirs.n_embd)
        model = cls(GPTConfig(*sizes, dropout))
        load_weights(model, transposed(pretrained.float().state_dict()))
        return model

    def save_pretrained(self, folder: str | Path, end: int | None = None) -> None:
        """Write `folder` in Hugging Face's format, for transformers' AutoModelForCausalLM; absent biases become zeros.

        `end` is the token that ends a text, if there is one. config.json comes last: a folder that has one is complete.
        Raises ValueError for a GPT with a part left out.
        """
        import transformers
        from safetensors.torch import save_file

        config = self.config
        config.require_gpt2()
        shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        ends = {"bos_token_id": end, "eos_token_id": end}
        theirs = transformers.GPT2LMHeadModel(  # its biases are zeros
            transformers.GPT2Config(n_positions=config.block_size, **shape, **dropouts, **ends)
        )
        theirs.load_state_dict(transposed(self.state_dict()), strict=False)
        theirs.config.architectures = ["GPT2LMHeadModel"]
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").unlink(missing_ok=True)
        generation = {"max_length": config.block_size, "pad_token_id": end, **ends}  # beyond it, there is no position
        transformers.GenerationConfig(**generation).save_pretrained(folder)
        save_file(theirs.transformer.state_dict(), weights := Path(folder) / "model.safetensors", {"format": "pt"})
        shutil.copymode(Path(folder) / "generation_config.json", weights)  # as the umask says, not for the owner alone
        theirs.config.save_pretrained(folder)


class Bigram(LanguageModel):
    """The simplest language model: row i of one table holds the logits of what follows token i. It has no context."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.lm_head = nn.Embedding(config.vocab_size, config.vocab_size)
        self.initialize()

    def hidden(self, idx: Tensor, start: int = 0, caches: list[KVCache] | None = None) -> Tensor:
        return idx


MODELS = {"gpt": GPT, "bigram": Bigram}


# Weights in files: checkpoints, and what from_pretrained and save_pretrained need


GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# The values in a config.json that the model above computes.
GPT2 = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def checkpoint_in(source: str | Path) -> Path | None:
    """The checkpoint that `source` is or holds; None for weights in Hugging Face's format.

    Raises FileNotFoundError where there is neither.
    """
    for path in (Path(source) / "best.pt", Path(source) / "ckpt.pt", Path(source)):
        if path.is_file():
            return path
    if (Path(source) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{source} holds an adapter: merge it into its model first, by peft's merge_and_unload")
    if source in GPT2_NAMES or (Path(source) / "config.json").is_file():
        return None
    others = ", ".join(sorted({path.parent.as_posix() for path in Path("out").rglob("*.pt")}))
    hint = f"there is one in {others}" if others else "python train.py makes one"
    raise FileNotFoundError(f"there is no checkpoint in {source}; {hint}")


def open_model(source: str | Path) -> tuple[LanguageModel, dict]:
    """The model, on the CPU, of a checkpoint, and what else the checkpoint holds: see `read_checkpoint`. No dropout.

    `source`: a checkpoint, a folder with one, or weights in Hugging Face's format, which hold nothing else: a folder
    or one of GPT2_NAMES.
    """
    path = checkpoint_in(source)
    if path is None:
        return GPT.from_pretrained(source), {}
    checkpoint = read_checkpoint(path)
    return model_of(checkpoint), checkpoint


def read_checkpoint(path: str | Path) -> dict:
    """What a checkpoint of train.py holds, or nanoGPT's in the same form, on the CPU; no code in it is run.

    Raises ValueError for another format; zipfile and torch.load have exceptions of their own for a damaged file.
    """
    with zipfile.ZipFile(path) as container:
        if damaged := container.testzip():  # torch itself does not look at the checksums
            raise ValueError(f"wrong checksum of {damaged}")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    wrappers = r"^((module|_orig_mod)\.)+"  # DistributedDataParallel and torch.compile put these before names
    checkpoint["model"] = {re.sub(wrappers, "", name): weight for name, weight in checkpoint["model"].items()}
    if "model_args" in checkpoint:
        checkpoint = from_nanogpt(checkpoint)
    if checkpoint["format"] != 1:
        raise ValueError(f"it has format {checkpoint['format']!r}, not 1")
    return checkpoint


def from_nanogpt(theirs: dict) -> dict:
    """A checkpoint of nanoGPT in the form of train.py's, without optimizer and tokenizer."""
    shape, weights = theirs["model_args"], theirs["model"]
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}  # an old mask
    if shape["vocab_size"] == 50304:  # GPT-2's 50,257 tokens rounded up for speed: the rest never occurs
        shape = shape | {"vocab_size": 50257}
        weights |= {name: weights[name][:50257] for name in ("transformer.wte.weight", "lm_head.weight")}
    config = {"model": "gpt", "dataset": theirs["config"]["dataset"]}
    facts = {"format": 1, "model_config": shape, "model_args": shape, "step": theirs["iter_num"]}
    return facts | {"model": weights, "config": config}


def model_of(checkpoint: dict) -> LanguageModel:
    """The model of what `read_checkpoint` returns. Raises ValueError for weights that its model_config does not have.

    What a checkpoint's model_config lacks has GPTConfig's default.
    """
    config = GPTConfig(**checkpoint["model_config"] | {"dropout": 0.0})
    build, weights = MODELS[checkpoint["config"]["model"]], checkpoint["model"]
    with torch.device("meta"):  # takes no memory, whatever sizes a damaged config has
        expected = build(replace(config, n_layer=min(config.n_layer, len(weights)))).state_dict()
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
        raise ValueError("its weights have other names or shapes than its model_config says")
    model = build(config)
    load_weights(model, weights)
    return model


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises ValueError for weights that are not finite, and where two names of one parameter have different ones."""
    model.load_state_dict(weights)
    loaded = model.state_dict()
    for name, parameter in loaded.items():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
        if not torch.equal(parameter, weights[name].to(parameter.dtype)):
            names = [other for other in loaded if loaded[other].data_ptr() == parameter.data_ptr()]
            raise ValueError(f"{' and '.join(names)} differ, but are one parameter of this model")


def transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Between GPT-2's Conv1D, which stores its weight as (in, out), and nn.Linear, which stores it as (out, in)."""
    return {name: w.T if ".h." in name and w.dim() == 2 else w for name, w in weights.items()}


# Devices


def choose_device(name: str, processes: int = 1) -> torch.device:
    """The device `name`, or for "auto" the best one, for each of so many processes on this machine.

    Raises ValueError for one that is not available.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes > 1:  # one GPU each, or gloo on CPUs; no backend connects processes on mps
        available = ["cuda"] * (gpus >= processes) + ["cpu"]
    else:
        mps = torch.backends.mps.is_available()
        available = ["cuda"] * bool(gpus) + ["mps"] * mps + ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    if name not in (*available, "auto"):
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise ValueError(f"device {name!r} is not available{each}; available: {', '.join(available)}")
    device = torch.device(available[0] if name == "auto" else name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype `name`; auto: float32, or on cuda the one of 16 bits that the card has."""
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return getattr(torch, "float32" if name == "auto" else name)


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The same for training, where bfloat16 is safe, too. Raises ValueError for a dtype that is not."""
    if name == "float16" and device.type != "cuda":
        raise ValueError(f"float16 needs the loss scaling of a cuda device, found {device}; use bfloat16 or float32")
    # bfloat16 is faster with AMX, and with AVX-512's instructions for it on an AMD EPYC. On an Intel Xeon (family 6,
    # model 207) without its AMX, a step of the small recipe takes 1.6 times as long as in float32.
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch below 2.11 does not tell: float32
    fast = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", ""))
    return torch.bfloat16 if name == "auto" and device.type == "cpu" and fast else choose_dtype(name, device)


# Dense bfloat16 FLOP/s, from the makers' data sheets: of cards whose names match the pattern; the first match counts.
PEAK_FLOPS = {
    "A100": 312e12, "A10$": 125e12, "L4$": 121e12, "L40S": 362e12, "RTX 4090$": 165e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100 80GB HBM3": 989e12, "H200 NVL": 835e12, "H200": 989e12, r"\bB200": 2250e12,
    "GB200": 2500e12, "MI300X": 1307e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a device; None where unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if re.search(card, name) and "MIG" not in name), None)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free; otherwise the OS takes it back and zeroes it again in every step.

    A step of config/shakespeare_char_cpu.py takes 26 ms instead of 33, one of the reference model a tenth less.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # musl has none
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large tensor
