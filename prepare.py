"""Turn a text into tokens: data/<dataset>/{input.txt,train.bin,val.bin,meta.json}, and read them back.

Start at `tokenize`, which does what the lecture does: the sorted set of the text's characters (`count_characters`),
stoi and itos (`CharTokenizer`), the first 90 % for training and the rest for validation. What it calls stands below
it. A text is read in pieces, so one of any size takes little memory. Nothing here knows about models.

    python prepare.py                                     Tiny Shakespeare
    python prepare.py --dataset=mine --input=mine.txt     any UTF-8 text
    python prepare.py --dataset=stdlib_char               the source of Python's standard library: no network needed
    python prepare.py --dataset=mine --input=mine.txt --tokenizer=bpe --vocab_size=512     tokens, not characters
    python prepare.py --dataset=fineweb --shards=10       a billion tokens of web pages, in GPT-2's vocabulary
"""

import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from config import ConfigError, UserError, explained, flag, key, progress, read, run, show

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TOKEN = np.dtype("<u2")  # train.bin and val.bin hold only token ids: little-endian uint16, as in nanoGPT
MAX_VOCAB_SIZE = 2**16
END = "<|endoftext|>"  # GPT-2's token between two texts; the facts of another tokenizer may name its own
GPT2_FACTS = {"tokenizer": "gpt2", "vocab_size": 50257}
TOKENIZER_FACTS = ("tokenizer", "vocab_size", "chars", "json", "end")  # in meta.json and in a checkpoint
PIECE = 2**20  # how much is read at once: characters of a text, bytes of a download
LEARN_FROM = 2**26  # a BPE is learned from at most so many bytes of the text
TIMEOUT = (10, 30)  # of a download, in seconds: to connect, and between two pieces of data
LONG = 2**24  # bytes of a file from which reading and downloading it show progress
# FineWeb's sample of 10 billion tokens (Penedo et al., 2024; ODC-By 1.0), in GPT-2's tokens, on the Hugging Face hub.
# Each shard is a header of 256 int32 (SHARD_MAGIC, the version 1, the number of tokens, zeros) and 100 million uint16.
FINEWEB, SHARDS, SHARD_MAGIC, SHARD_HEADER = "kjj0/fineweb10B-gpt2", 103, 20240520, 1024


@dataclass
class PrepareConfig:
    """Turn a text into the tokens that train.py reads: data/<dataset>/train.bin, val.bin and meta.json."""

    dataset: str = key("shakespeare_char", "folder under data/ to write")
    input: str | None = key(None, "what to prepare: a file, any UTF-8 text, or a folder, whose .txt files are joined")
    url: str | None = key(None, "a text to download and prepare")
    val_fraction: float = key(0.1, "share of the text held back for validation: its end", above=0, below=1)
    tokenizer: str = key(
        "auto",
        "what a token is\n"
        "char: each character of the text\n"
        "bpe: frequent strings, learned from the text\n"
        "gpt2: GPT-2's 50,257 tokens\n"
        "FOLDER or FILE: the tokens of a checkpoint, to train it further; of a tokenizer.json; of another meta.json\n"
        "auto: gpt2 for a dataset whose name ends in _gpt2, else char",
    )
    drop_unknown: bool = key(False, "leave out the characters of the text that --tokenizer lacks")
    vocab_size: int | None = key(None, "of bpe, each byte being a token; None: 512", least=256, most=MAX_VOCAB_SIZE)
    shards: int | None = key(None, "of fineweb, each of 100 million tokens, 200 MB; None: all", least=1, most=SHARDS)

    def __post_init__(self):
        dataset_folder(self.dataset)  # raises for a bad name
        if self.tokenizer == "auto":
            self.tokenizer = "gpt2" if self.dataset.endswith("_gpt2") else "char"


def main(argv: list[str]) -> None:
    config = read(PrepareConfig, argv)
    given, fineweb, bpe = config.given, config.dataset == "fineweb", config.tokenizer == "bpe"
    unnamed = given & {"input", "url"} and "dataset" not in given
    mistakes = [
        (given >= {"input", "url"}, "give --input or --url, not both: a dataset is one text"),
        (unnamed, f"a text of your own needs a name, --dataset=NAME: {config.dataset} is Tiny Shakespeare"),
        (fineweb and given - {"dataset", "shards"}, "fineweb is ready made: only --shards can be chosen"),
        ("shards" in given and not fineweb, f"shards needs --dataset=fineweb, found {config.dataset}"),
        ("vocab_size" in given and not bpe, f"vocab_size needs --tokenizer=bpe, found {config.tokenizer}"),
    ]
    for made, message in mistakes:
        if made:
            raise ConfigError(message)
    prepare(config)


# A text becomes a dataset


def prepare(config: PrepareConfig, overwrite: bool = True) -> None:
    """Write the dataset; unless `overwrite`, leave a complete one alone.

    meta.json is written last: a folder that has one is complete. A second process that prepares the same dataset waits.
    """
    folder = dataset_folder(config.dataset)
    with locked(folder / "lock", wait=True):
        if (folder / "meta.json").exists() and not overwrite:
            return
        facts = download_fineweb(config, folder) if config.dataset == "fineweb" else tokenize(config, folder)
        write_json(folder / "meta.json", facts)
    kind = "characters" if facts["tokenizer"] == "char" else "tokens"
    sizes = f"{facts['train_tokens']:,} train tokens, {facts['val_tokens']:,} validation tokens"
    show(f"{folder}, from {facts['source']}: {facts['vocab_size']:,} different {kind}, {sizes}")


def tokenize(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Write input.txt, train.bin and val.bin; return what meta.json says of them.

    The text is split, not the tokens: every tokenizer has the same text for validation, so that bits per byte compare.
    """
    made_of_the_text = config.tokenizer in ("char", "bpe")
    tokenizer = None if made_of_the_text else given_tokenizer(config.tokenizer)  # fails before a long download
    text = find_text(config, folder / "input.txt", tokenizer)
    counts = count_characters(text)
    if config.tokenizer == "char":
        tokenizer = CharTokenizer("".join(counts))
    elif config.tokenizer == "bpe":
        tokenizer = learned_bpe(text, config.vocab_size or 512)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f"{tokenizer.vocab_size:,} different tokens: uint16 can tell {MAX_VOCAB_SIZE:,} apart")
    unknown = unknown_characters(text, counts, tokenizer, config.drop_unknown)  # usually none
    n_chars = sum(counts.values()) - sum(counts[char] for char in unknown)
    n_train = int(n_chars * (1 - config.val_fraction))

    n_read, train_tokens, val_tokens, val_bytes = 0, 0, 0, 0  # n_read: characters
    sha256 = hashlib.sha256()
    with replacing(folder / "train.bin") as train_bin, replacing(folder / "val.bin") as val_bin:
        for piece in text:
            if unknown:
                piece = piece.translate(str.maketrans("", "", unknown))
            split = max(0, n_train - n_read)  # where validation begins in this piece; past its end, all is training
            train, val = piece[:split], piece[split:]
            train_tokens += write_tokens(train, tokenizer, train_bin, text.path)
            val_tokens += write_tokens(val, tokenizer, val_bin, text.path)
            val_bytes += len(val.encode())
            n_read += len(piece)
            sha256.update(piece.encode())
        if not train_tokens or not val_tokens:
            raise UserError(f"{text.path} is too short for --val_fraction={config.val_fraction}: a split has no token")
        # Until here the new tokens are in temporary files. Now, in this order:
        # 1. both are flushed: a full disk shows while the old dataset is whole
        # 2. input.txt is replaced (--url did so already)
        # 3. the old meta.json is removed: from here on the folder counts as incomplete
        # 4. val.bin, then train.bin are replaced, as the block ends
        # 5. the new meta.json is written, in `prepare`
        # So meta.json never describes other tokens than those beside it. After a kill, the same command starts anew.
        for file in (train_bin, val_bin):
            flush_to_disk(file)
        if config.input:
            with replacing(folder / "input.txt") as input_txt:
                input_txt.writelines(piece.encode() for piece in text)
        (folder / "meta.json").unlink(missing_ok=True)
    sizes = {"train_tokens": train_tokens, "val_tokens": val_tokens, "val_bytes": val_bytes}
    origin = {"source": text.source, "sha256": sha256.hexdigest(), "val_fraction": config.val_fraction}
    return tokenizer.facts | sizes | origin


def write_tokens(text: str, tokenizer: "Tokenizer", file: IO[bytes], path: Path) -> int:
    """Append the tokens of `text`, a part of `path`, to `file`; return how many. Raises UserError if text is lost."""
    ids = tokenizer.encode(text)
    # Some decoders drop the first space of what they decode.
    if not isinstance(tokenizer, CharTokenizer) and tokenizer.decode(ids).lstrip(" ") != text.lstrip(" "):
        raise UserError(f"{path} cannot be written in these tokens: decoding them does not return it")
    file.write(ids)  # the bytes of the array, uint16
    return len(ids)


def count_characters(text: "Text") -> dict[str, int]:
    """{character: how often it occurs}; the keys are the lecture's sorted(set(text)). Raises UserError for no UTF-8."""
    counts = np.zeros(sys.maxunicode + 1, np.int64)  # by code point, the number of a character in Unicode
    for piece in text:
        found = np.bincount(code_points(piece))
        counts[: len(found)] += found
    if counts[0] > max(100, counts.sum() / 50):  # English in UTF-16 is valid UTF-8, with a NUL at every second place
        raise not_utf8(text.path, f"{counts[0]:,} of its {counts.sum():,} characters are NUL")
    return {chr(point): int(counts[point]) for point in np.flatnonzero(counts)}


def unknown_characters(text: "Text", counts: dict[str, int], tokenizer: "Tokenizer", drop: bool) -> str:
    """The characters of the text that the tokenizer lacks. Raises UserError if there are any, unless `drop`."""
    known = tokenizer.facts.get("chars", counts)  # only a character tokenizer lacks some
    unknown = sorted(counts.keys() - {*known}, key=lambda char: (-counts[char], char))  # the most frequent first
    if unknown:
        named = ", ".join(f"{char!r} ({counts[char]:,})" for char in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        problem = f"{text.path} has characters that the vocabulary lacks: {named}{more}"
        if not drop:
            raise UserError(f"{problem}; --drop_unknown leaves them out")
        show(f"{problem}; left out")
    return "".join(unknown)


def dataset_folder(dataset: str) -> Path:
    """data/<dataset>; raises ConfigError for a name that could lead out of data/."""
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        raise ConfigError(f"dataset must be a plain folder name (letters, digits, _ - .), found {dataset!r}")
    return Path("data") / dataset


# The text

# A text is read in pieces. A piece is cut into parts, which the cores encode side by side. Both are cut after a word
# and before a space, where a token of GPT-2's ends anyway: the cuts do not change its tokens. They may change those of
# another tokenizer a little; that no text is lost is checked by `write_tokens`.
PART = 2**14  # characters in a part, at most
WORD_END = r"(?<=[^\W_])(?= )"
PARTS = re.compile(rf"(?s).{{1,{PART}}}{WORD_END}|.{{1,{PART}}}")  # where no word ends, a part ends anywhere


class Text:
    """A UTF-8 file, or the .txt files of a folder in the order of their names; iterating yields pieces, each time anew.

    source: where the text came from. between: what is put between two files.
    """

    def __init__(self, path: Path, source: str, between: str = "\n"):
        self.path, self.source, self.between = path, source, between
        self.files = [path] if path.is_file() else sorted(path.glob("[!.]*.txt"))

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            if file != self.files[0]:
                yield self.between
            yield from read_pieces(file)


def read_pieces(path: Path) -> Iterator[str]:
    """Yield the file's text piece by piece, each up to the end of a word. Raises UserError if it is not UTF-8."""
    rest, n_bytes = "", path.stat().st_size
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            while more := file.read(PIECE):
                show_bytes(f"reading {path}", file.buffer.tell(), n_bytes)
                *parts, rest = PARTS.findall(rest + more)
                yield "".join(parts)  # the rest may end within a word, so it waits for what is read next
        except UnicodeDecodeError as error:
            # error.object are the bytes that were being decoded; they end where the file has been read to.
            at = file.buffer.tell() - len(error.object) + error.start
            raise not_utf8(path, f"byte {at:,} is {error.object[error.start]:#x}") from None
    yield rest


def not_utf8(path: object, found: str) -> UserError:
    way = f"iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
    return UserError(f"{path} is not UTF-8 text: {found}; convert it from its encoding, for instance: {way}")


def find_text(config: PrepareConfig, path: Path, tokenizer: "Tokenizer | None") -> Text:
    """The text of --input or --url, else the dataset's own, `path`, which is fetched if it is a known one."""
    if config.input:
        text = Text(Path(config.input), config.input, tokenizer.facts.get("end", "\n") if tokenizer else "\n")
        if not text.files:
            raise ConfigError(f"--input: there is no file, or folder with .txt files, {config.input}")
        return text
    source = config.url or str(path)
    if config.url:
        download(config.url, path)
    elif path.exists():
        with suppress(UserError, OSError, KeyError):
            source = load_meta(config.dataset)["source"]  # where this text came from before
    elif config.dataset in ("shakespeare_char", "shakespeare_gpt2"):
        advice = f"; put the text at {path}, or train without a network: python train.py config/stdlib_char.py"
        download(source := SHAKESPEARE_URL, path, advice, SHAKESPEARE_SHA256)
    elif config.dataset == "stdlib_char":
        source = collect_stdlib(path)
    elif path.with_name("train.bin").exists():
        facts = f'{json.dumps(GPT2_FACTS)} or {{"tokenizer": "char", "vocab_size": N, "chars": "..."}}'
        raise ConfigError(f"{path.parent} has tokens but no meta.json, which must say what they mean: {facts}")
    else:
        raise ConfigError(f"there is no {path}: python prepare.py --dataset={config.dataset} --input=FILE makes it")
    return Text(path, source)


def download(url: str, path: Path, advice: str = "", sha256: str | None = None) -> None:
    """Download `url` to `path`; broken connections and overload are tried again. Raises UserError when all fail."""
    import requests  # takes 0.1 s, and most runs download nothing

    show(f"downloading {url}")
    for pause in (0, 1, 2, 4):  # seconds
        time.sleep(pause)
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT) as response:
                response.raise_for_status()
                return save(response, path, sha256)
        except requests.HTTPError:  # raised by raise_for_status
            problem = f"the server answered {response.status_code} {response.reason}"
            if response.status_code < 500 and response.status_code != 429:  # 429: too many requests
                break
        except ValueError as error:  # a wrong address, or wrong content
            problem = str(error)
            break
        except requests.RequestException as error:
            problem = f"the connection failed ({type(error).__name__})"
    raise UserError(f"cannot download {url}: {problem}{advice}")


def save(response: Any, path: Path, sha256: str | None) -> None:
    """Write the body of the response to `path`. Raises ValueError when its hash is not `sha256`."""
    digest = hashlib.sha256()
    with replacing(path) as file:
        for piece in response.iter_content(PIECE):
            file.write(piece)
            digest.update(piece)
            show_bytes(f"downloading {path}", file.tell(), int(response.headers.get("Content-Length", 0)))
        if sha256 not in (None, digest.hexdigest()):
            raise ValueError(f"wrong content, {file.tell():,} bytes of sha256 {digest.hexdigest()}, expected {sha256}")


def show_bytes(what: str, done: int, total: int) -> None:
    """Progress in bytes; `total` is 0 where it is unknown."""
    if max(done, total) > LONG:
        progress.show(f"{what}: {done / 1e6:,.0f}{f' of {total / 1e6:,.0f}' if total else ''} MB")


def collect_stdlib(path: Path) -> str:
    """Write the standard library's Python files, those that are ASCII, one after another; return the text's source."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    with replacing(path) as file:
        for source in sorted(root.rglob("*.py"), key=Path.as_posix):
            if left_out.isdisjoint(source.relative_to(root).parts) and (text := source.read_bytes()).isascii():
                file.write(text)
    return f"the standard library of Python {sys.version.split()[0]}"


# The tokens


def code_points(text: str) -> np.ndarray:
    """[ord(char) for char in text], but fast."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")  # raises for surrogates, which are no characters


class CharTokenizer:
    """Every character is a token: the lecture's stoi and itos, as arrays, in which numpy looks up many at once."""

    end = None  # it has no token for the end of a text

    def __init__(self, chars: str):
        self.vocab_size = len(chars)
        self.facts = {"tokenizer": "char", "vocab_size": self.vocab_size, "chars": chars}  # for meta.json
        self.itos = code_points(chars)
        self.stoi = np.full(sys.maxunicode + 1, -1, np.int32)  # code point -> id, or -1
        self.stoi[self.itos] = np.arange(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Token ids (uint16). Raises ValueError that names the first character outside the vocabulary."""
        ids = self.stoi[code_points(text)]
        if ids.min(initial=0) < 0:
            first = ids.argmin()
            raise ValueError(f"character {text[first]!r} at position {first} is not in the vocabulary")
        return ids.astype(TOKEN)

    def decode(self, ids: np.ndarray) -> str:
        return self.itos[ids].tobytes().decode("utf-32-le")

    def to_library(self) -> Any:
        """The same tokenizer, as an object of Hugging Face's library `tokenizers`."""
        import tokenizers

        stoi = {char: id for id, char in enumerate(self.facts["chars"])}
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel(stoi))
        library.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        library.decoder = tokenizers.decoders.Fuse()
        return library


class SubwordTokenizer:
    """What Hugging Face's library `tokenizers` makes of a text: GPT-2's tokens, a BPE learned here, any tokenizer.json.

    `content` is that of a tokenizer.json, `end` the token that ends a text, where it has one. Raises many types of
    exceptions for an unusable one.
    """

    def __init__(self, name: str, content: str, end: str = END):
        import tokenizers

        self.library = tokenizers.Tokenizer.from_str(content)
        self.library.no_padding()
        self.library.no_truncation()
        self.library.post_processor = None  # it only adds tokens to those of the text
        self.vocab_size = max(self.library.get_vocab().values(), default=-1) + 1
        self.facts = {"tokenizer": name, "vocab_size": self.vocab_size, "json": self.library.to_str()}
        if self.library.token_to_id(end) is None:
            end = END
        self.end = self.library.token_to_id(end)
        if self.end is not None:
            self.facts["end"] = end

    @explained("the tokenizer cannot encode this text")
    def encode(self, text: str) -> np.ndarray:
        """Token ids (uint16); a long text is divided among all cores. Raises UserError for one it cannot encode."""
        encodings = self.library.encode_batch_fast(PARTS.findall(text), add_special_tokens=False)
        return np.array([id for encoding in encodings for id in encoding.ids], TOKEN)

    @explained("the tokenizer cannot decode these tokens")
    def decode(self, ids: np.ndarray) -> str:
        return self.library.decode(ids.tolist(), skip_special_tokens=False)

    def to_library(self) -> Any:
        return self.library


Tokenizer = CharTokenizer | SubwordTokenizer


def learned_bpe(text: Text, vocab_size: int) -> SubwordTokenizer:
    """Byte-pair encoding (Sennrich et al., 2016) learned from the text. It starts from bytes, as GPT-2's does.

    The library keeps every different word in memory, so a long text is sampled: every k-th piece of it is read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    settings = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    settings["max_token_length"] = 32  # bytes; else, in a text without spaces, a token could be a whole passage
    n_bytes = sum(file.stat().st_size for file in text.files)
    every_kth_piece = itertools.islice(text, 0, None, 1 + n_bytes // LEARN_FROM)
    parts = (part for piece in every_kth_piece for part in PARTS.findall(piece))  # the library holds 256 at a time
    library.train_from_iterator(parts, trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    return SubwordTokenizer("bpe", library.to_str())


# A tokenizer is stored as its facts (TOKENIZER_FACTS), in meta.json and in a checkpoint. `file_facts` finds them
# in a file, `checkpoint_facts` in an opened checkpoint; `tokenizer_of` makes the tokenizer from them.


def given_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --tokenizer names. Raises ConfigError."""
    with explained(f"--tokenizer={name} is not usable", kind=ConfigError):
        return tokenizer_of(GPT2_FACTS if name == "gpt2" else file_facts(Path(name)))


def file_facts(path: Path) -> dict:
    """The facts in a checkpoint, a tokenizer.json, a folder with one of them, or a meta.json. Raises ConfigError."""
    files = [file for file in (path, path / "best.pt", path / "ckpt.pt", path / "tokenizer.json") if file.is_file()]
    if not files or files[0].suffix not in (".pt", ".json"):
        ways = "char, bpe, gpt2, a tokenizer.json, its folder or a meta.json, or a checkpoint"
        raise ConfigError(f"there is no tokenizer {path}: take {ways}")
    if files[0].suffix == ".pt":
        import torch

        return checkpoint_facts(torch.load(files[0], map_location="cpu", mmap=True, weights_only=True), files[0])
    content = files[0].read_text(encoding="utf-8")
    facts = json.loads(content)
    if "tokenizer" in facts:  # a meta.json
        return facts
    end = END
    # In Hugging Face's format either file may name it; where both do, tokenizer_config.json wins.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if files[0].with_name(name).is_file():
            end = json.loads(files[0].with_name(name).read_bytes()).get("eos_token") or end
    return {"tokenizer": str(files[0]), "json": content, "end": end["content"] if isinstance(end, dict) else end}


def checkpoint_facts(checkpoint: dict, source: str | Path) -> dict:
    """The facts in a checkpoint that was read from the file `source`. Raises KeyError for what is no checkpoint.

    nanoGPT's has none: they are GPT-2's, or in its dataset's meta.json. Raises UserError if the vocab_size differs.
    """
    if "tokenizer" in checkpoint:
        return checkpoint["tokenizer"]
    dataset, vocab_size = checkpoint["config"]["dataset"], checkpoint["model_args"]["vocab_size"]
    vocab_size = GPT2_FACTS["vocab_size"] if vocab_size == 50304 else vocab_size  # nanoGPT rounds it up, for speed
    path = dataset_folder(dataset) / "meta.json"
    facts = load_meta(dataset) if path.exists() else GPT2_FACTS
    if facts["vocab_size"] != vocab_size:
        problem = f"{path} has {facts['vocab_size']}" if path.exists() else f"{path} is missing"
        way = f"python prepare.py {flag('dataset', dataset)} --input=FILE makes it from the text it was trained on"
        raise UserError(f"the checkpoint {source} of nanoGPT has {vocab_size} tokens, but {problem}: {way}")
    return {name: facts[name] for name in TOKENIZER_FACTS if name in facts}


def tokenizer_of(facts: dict) -> Tokenizer:
    """The tokenizer that meta.json or a checkpoint describes. Raises many types of exceptions for an unusable one."""
    name = facts["tokenizer"]
    if name == "char":
        chars = facts["chars"]
        if not isinstance(chars, str) or not len(set(chars)) == len(chars) == facts["vocab_size"]:
            raise ValueError("chars must be as many different characters as vocab_size says")
        return CharTokenizer(chars)
    if isinstance(facts.get("json"), str):
        return SubwordTokenizer(name, facts["json"], facts.get("end", END))
    if name != "gpt2":
        raise UserError(f"tokenizer {name!r} is not supported; there are 'char', 'gpt2' and any with a tokenizer.json")
    quiet_hub(needed=True)
    import tokenizers

    with explained("cannot get GPT-2's tokenizer from Hugging Face's hub", "; --tokenizer=FILE takes a tokenizer.json"):
        return SubwordTokenizer("gpt2", tokenizers.Tokenizer.from_pretrained("gpt2").to_str())


def hub() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def quiet_hub(needed: bool) -> None:
    """Call it before transformers is imported: no warnings, no bars; if the hub is `needed` but away, no attempts."""
    import requests

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if needed:
            requests.head(hub(), timeout=5)
    except requests.RequestException:
        os.environ["HF_HUB_OFFLINE"] = "1"  # use the cache, or fail at once; else it tries for 24 s


def decoded_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of the tokens as they come, in whole characters: one may take several tokens."""
    before, new = [], []  # the tokens whose text was yielded last, and those that came since
    for id in itertools.chain(ids, [None]):  # None: the end
        if id is not None:
            new.append(id)
        # Some tokenizers drop the leading space of whatever they decode. So the new tokens are never decoded alone, but
        # after those of before, whose text is cut off.
        shown = tokenizer.decode(np.array(before, TOKEN))
        text = tokenizer.decode(np.array(before + new, TOKEN))[len(shown) :]
        if text and (id is None or not text.endswith("\ufffd")):  # U+FFFD stands for an unfinished character
            yield text
            before, new = new, []


# Reading back


def prepared(dataset: str) -> dict:
    """meta.json of the dataset, which is prepared first where it is missing. Says so if its text was edited since."""
    meta, text = dataset_folder(dataset) / "meta.json", dataset_folder(dataset) / "input.txt"
    if not meta.exists():
        prepare(PrepareConfig(dataset=dataset), overwrite=False)
    elif text.exists() and text.stat().st_mtime > meta.stat().st_mtime + 60:
        # A minute, because copying a folder may give its files their times in any order.
        split = flag("val_fraction", load_meta(dataset).get("val_fraction", 0.1))
        again = f"python prepare.py {flag('dataset', dataset)} {flag('tokenizer', meta)} {split}"
        show(f"{text} is newer than its tokens, which are used as they are: {again} makes new ones")
    return load_meta(dataset)


def load_meta(dataset: str) -> dict:
    """The content of meta.json, checked. Raises UserError when it is damaged."""
    path = dataset_folder(dataset) / "meta.json"
    with explained(f"{path} is damaged", "; prepare.py makes it anew"):
        meta = json.loads(path.read_bytes())
        if meta["tokenizer"] == "char":  # any other one is only needed when there is a text to encode
            tokenizer_of(meta)
        sizes = meta["vocab_size"], meta.get("val_bytes", 1)  # unknown for tokens that were not made here
        if any(type(size) is not int or size < 1 for size in sizes) or sizes[0] > MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size and val_bytes cannot be {sizes}")
        return meta


class Tokens:
    """One split of a dataset, "train" or "val", memory-mapped: only what is used is read from disk.

    Raises UserError for a damaged file and for one that is too short for `block_size`.
    """

    def __init__(self, dataset: str, split: str, meta: dict, block_size: int):
        self.path = dataset_folder(dataset) / f"{split}.bin"
        self.vocab_size = meta["vocab_size"]
        self.n_bytes = meta.get(f"{split}_bytes")  # of its text, where that is known
        with explained(f"{self.path} is damaged", "; remove it, and prepare.py makes it anew"):
            promised = meta.get(f"{split}_tokens")
            growing = split == "train" and "shards" in meta  # train.bin may hold more shards than count
            n_tokens = promised if growing else None  # None: all of them; numpy refuses half a token
            self.ids = np.memmap(self.path, TOKEN, "r", shape=n_tokens)
            if promised not in (None, len(self)):
                raise ValueError(f"it holds {len(self)} tokens, meta.json promises {promised}")
        if len(self) <= block_size:
            needed = f"block_size {block_size} and a target: lower --block_size or prepare a longer text"
            raise UserError(f"{self.path} has {len(self)} tokens, too few for {needed}")

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> tuple[int, str]:
        """How many tokens, and a hash of the first and the last million."""
        digest = hashlib.sha256(self.ids[:1_000_000])
        digest.update(self.ids[-1_000_000:])
        return len(self), digest.hexdigest()

    def blocks(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each of `starts` (B,), and the one after them: ids (B, length + 1), int64.

        Raises OSError for an id outside the vocabulary: no embedding may be indexed with it.
        """
        rows = sliding_window_view(self.ids, length + 1)[starts].astype(np.int64)
        if rows.max() >= self.vocab_size:
            raise OSError(f"{self.path} has token id {rows.max()}; the vocabulary has {self.vocab_size} tokens")
        return rows


# FineWeb


def download_fineweb(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Write val.bin and append to train.bin the shards that it lacks; return what meta.json says of them.

    shards.json has the number of tokens of every complete shard in train.bin, and is written when they are on disk. An
    interrupted download may leave bytes after them, which are cut off here. meta.json may count fewer shards.
    """
    record, train, val = folder / "shards.json", folder / "train.bin", folder / "val.bin"
    if not record.exists() and (train.exists() or val.exists()):
        raise UserError(f"{folder} has tokens but no shards.json, which says of what: move {train} and {val} away")
    with explained(f"{record} is damaged", f"; remove it and {train}"):
        counts = json.loads(record.read_bytes()) if train.exists() else []  # without train.bin, all start anew
        if not isinstance(counts, list) or any(type(count) is not int or count <= 0 for count in counts):
            raise ValueError("it must hold the number of tokens of each shard")
        if counts and 2 * sum(counts) > train.stat().st_size:
            raise ValueError(f"{train} is shorter than its shards")
    n_shards = config.shards or SHARDS
    missing = max(0, n_shards - len(counts)) + (not val.exists())
    show(f"{folder}: {n_shards} of FineWeb's {SHARDS} shards, {0.2 * missing:.1f} GB to download")
    write_json(record, counts)  # first: tokens without it are taken for another dataset's, above
    if not val.exists():
        with replacing(val) as file:
            add_shard("fineweb_val_000000.bin", file, folder)
    while len(counts) < n_shards:
        with open(train, "ab") as file:
            file.truncate(2 * sum(counts))
            counts.append(add_shard(f"fineweb_train_{len(counts) + 1:06}.bin", file, folder))
            flush_to_disk(file)
        write_json(record, counts)
    sizes = {"train_tokens": sum(counts[:n_shards]), "val_tokens": val.stat().st_size // 2, "shards": n_shards}
    return GPT2_FACTS | sizes | {"source": f"huggingface.co/datasets/{FINEWEB}"}


def add_shard(name: str, file: IO[bytes], folder: Path) -> int:
    """Download a shard and append its tokens to `file`; return how many. Raises UserError for a damaged one."""
    path, url = folder / "shard.bin", f"{hub()}/datasets/{FINEWEB}/resolve/main/{name}"
    advice = "; the same command tries again, from this shard on"
    try:
        download(url, path, advice)
        with open(path, "rb") as shard, explained(f"{url} is damaged", advice):
            magic, version, n_tokens = np.frombuffer(shard.read(SHARD_HEADER), "<i4")[:3].tolist()
            expected = (SHARD_MAGIC, 1, (path.stat().st_size - SHARD_HEADER) / 2)
            if (magic, version, n_tokens) != expected:
                raise ValueError(f"its header says {magic}, {version}, {n_tokens}; expected {expected}")
            while piece := shard.read(PIECE):
                if (largest := np.frombuffer(piece, TOKEN).max()) >= GPT2_FACTS["vocab_size"]:
                    raise ValueError(f"it has token id {largest}")
                file.write(piece)
    finally:
        path.unlink(missing_ok=True)
    return n_tokens


# Files


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file beside `path`; where the block ends, it is flushed to disk and replaces `path`.

    If the block raises, `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            flush_to_disk(file)
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        for cause in (error, error.__context__):  # on a full disk torch.save raises another error over the system's
            if isinstance(cause, OSError) and cause.errno and not cause.filename:
                raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of the folder of `path` until the block ends: they `wait`, or get a UserError.

    The OS releases the lock when the process exits, even after SIGKILL. The file stays: removing it would be a race.
    """
    in_use = f"{path.parent} is in use by another run"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"{in_use}: let it end, or take another --out_dir") from None
            print(f"{in_use}: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # on Windows, or a file system without locks, go on without
        yield


if __name__ == "__main__":
    run(main)
