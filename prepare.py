"""Text to tokens: fetch a text, number its parts, write data/<dataset>/{input.txt,train.bin,val.bin,meta.json}.

Knows text and files; knows nothing of models. Works in pieces, so that memory does not grow with the text.

    python prepare.py                                     Tiny Shakespeare
    python prepare.py --dataset=mine --input=mine.txt     any UTF-8 text
    python prepare.py --dataset=stdlib_char               the source of Python's standard library: no network needed
    python prepare.py --dataset=mine --input=mine.txt --tokenizer=bpe --vocab_size=512     tokens, not characters
"""

import codecs
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

# While numpy is loaded, Ctrl-C just ends the program; then `run` sees to it. What ignores it goes on ignoring it.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np

from config import ConfigError, UserError, extra, key, read, run

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TOKEN = np.dtype("<u2")  # a .bin is nothing but these: little-endian uint16, the layout that nanoGPT uses too
MAX_VOCAB_SIZE = 2**16
PIECE = 2**20  # bytes of text in memory at a time
PART = 2**14  # characters that one thread encodes at a time
LEARN_FROM = 2**26  # bytes of text, at most, that a BPE is learned from
# Where a tokenizer surely divides a text: before the blank after a letter or digit.
WORD_END = r"(?<=[^\W_])(?= )"
PARTS = re.compile(rf"(?s).{{1,{PART}}}\Z|.{{1,{PART}}}{WORD_END}|.{{1,{PART}}}")
TIMEOUT = (10, 30)  # seconds to connect, and of silence during a download
ATTEMPTS = 4  # with 1, 2 and 4 seconds between them


@dataclass
class PrepareConfig:
    """Turn a text into the tokens that train.py reads: data/<dataset>/train.bin, val.bin and meta.json."""

    dataset: str = key("shakespeare_char", "folder under data/ to write")
    input: str | None = key(None, "a file to prepare: any UTF-8 text")
    url: str | None = key(None, "a text to download and prepare")
    val_fraction: float = key(0.1, "share of the tokens kept for validation: the last ones")
    tokenizer: str = key(
        "auto",
        "char, bpe, gpt2, or the path of a tokenizer.json, or of the meta.json of another dataset; "
        "auto: gpt2 for a dataset whose name ends so, else char",
    )
    vocab_size: int | None = key(None, "tokens that --tokenizer=bpe learns; None: 512")

    def __post_init__(self):
        dataset_folder(self.dataset)
        if self.tokenizer == "auto":
            self.tokenizer = "gpt2" if self.dataset.endswith("_gpt2") else "char"
        if self.tokenizer not in ("char", "bpe", "gpt2") and not self.tokenizer.endswith(".json"):
            raise ValueError(f"tokenizer must be char, bpe, gpt2 or a tokenizer.json, found {self.tokenizer!r}")
        if self.vocab_size and self.tokenizer != "bpe":
            raise ValueError(f"vocab_size is of --tokenizer=bpe, found --tokenizer={self.tokenizer}")
        if self.vocab_size and not 256 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be from 256, a token a byte, to {MAX_VOCAB_SIZE}, found {self.vocab_size}"
            )
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, found {self.val_fraction}")
        if self.input and self.url:
            raise ValueError("give --input or --url, not both: a dataset is one text")


def main(argv: list[str]) -> None:
    prepare(read(PrepareConfig, argv))


def prepare(config: PrepareConfig) -> None:
    """Fetch the text and write the dataset; meta.json comes last, so a folder that has one is complete."""
    folder = dataset_folder(config.dataset)
    source = fetch(config, folder / "input.txt")
    text = Path(config.input or folder / "input.txt")
    tokenizer = make_tokenizer(config, text)
    facts = encode_file(tokenizer, text, folder, config.val_fraction)
    if not ((folder / "input.txt").exists() and text.samefile(folder / "input.txt")):
        with open(text, "rb") as given, replacing(folder / "input.txt") as file:
            shutil.copyfileobj(given, file, PIECE)
    meta = tokenizer.to_dict() | facts | {"source": source}
    with replacing(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    print(
        f"{folder}: {tokenizer.vocab_size:,} {'characters' if config.tokenizer == 'char' else 'tokens'}, "
        f"{meta['train_tokens']:,} train tokens, {meta['val_tokens']:,} validation tokens"
    )


def dataset_folder(dataset: str) -> Path:
    """data/<dataset>; raises ConfigError for a name that could lead out of data/."""
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        raise ConfigError(f"dataset must be a plain folder name (letters, digits, _ - .), found {dataset!r}")
    return Path("data") / dataset


# The text


def fetch(config: PrepareConfig, path: Path) -> str:
    """Put the text at `path`, unless it is there already or a file given; return where it came from."""
    if config.input:
        if not os.path.isfile(config.input):
            raise ConfigError(f"--input: there is no file {config.input}")
        return config.input
    if config.url:
        download(config.url, path)
        return config.url
    if path.exists():
        return str(path)
    if config.dataset in ("shakespeare_char", "shakespeare_gpt2"):
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
        return SHAKESPEARE_URL
    if config.dataset == "stdlib_char":
        return collect_stdlib(path)
    raise ConfigError(
        f"there is no {path}: python prepare.py --dataset={config.dataset} --input=FILE makes it from a text"
    )


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Download `url` to `path`. Overload and broken connections are tried again; raises UserError when all fails."""
    import requests  # a tenth of a second, which only a download should cost

    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            host = urlsplit(url).hostname
            with requests.get(url, stream=True, timeout=TIMEOUT) as response:
                if response.ok:
                    return save(response.iter_content(PIECE), path, sha256)
                problem = f"{host} answered {response.status_code} {response.reason}"
                if response.status_code < 500 and response.status_code != 429:
                    break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            problem = f"the connection to {host} failed {attempt + 1} times ({type(error).__name__})"
        except (requests.RequestException, ValueError) as error:  # a wrong address, or wrong content
            problem = str(error)
            break
    raise UserError(
        f"cannot download {url}: {problem}. Three ways on: put the file at {path}; or python prepare.py "
        f"--dataset={path.parent.name} --input=FILE; or, with no network at all, python train.py config/stdlib_char.py"
    )


def save(pieces: Iterator[bytes], path: Path, sha256: str | None) -> None:
    """Write the pieces to `path`, with progress on a terminal. Raises ValueError when their hash is not `sha256`."""
    digest, received = hashlib.sha256(), 0
    with replacing(path) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            received += len(piece)
            if sys.stderr.isatty():
                print(f"\rdownloading {path}: {received / 1e6:.1f} MB \r", end="", file=sys.stderr, flush=True)
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"wrong content: {received:,} bytes of sha256 {digest.hexdigest()}, expected {sha256}")


def collect_stdlib(path: Path) -> str:
    """Write the ASCII sources of the running interpreter's standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    with replacing(path) as file:
        for source in sorted(root.rglob("*.py"), key=Path.as_posix):
            if left_out.isdisjoint(source.relative_to(root).parts) and (text := source.read_bytes()).isascii():
                file.write(text)
    return f"the standard library of Python {sys.version.split()[0]}"


def read_pieces(path: Path) -> Iterator[str]:
    """Yield the text piece by piece, each up to where its last word ends. Raises UserError if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, data = "", None
    with open(path, "rb") as file:
        while data != b"":
            data = file.read(PIECE)
            try:
                text += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                raise UserError(f"{path} is not UTF-8 text: byte {at:,} is {error.object[error.start]:#x}") from None
            end = last_word_end(text) if data else len(text)
            yield text[:end]
            text = text[end:]


def last_word_end(text: str) -> int:
    """Where to divide a text so that its tokens stay the same; its end where no word ends near that."""
    start = max(0, len(text) - PART)
    ends = [match.end() for match in re.finditer(WORD_END, text[start:])]
    return start + ends[-1] if ends else len(text)


def encode_file(tokenizer: "Tokenizer", path: Path, folder: Path, val_fraction: float) -> dict[str, Any]:
    """Write the tokens of the text to train.bin in `folder`, and the last of them to val.bin; returns facts of both."""
    digest, counts, last = hashlib.sha256(), [(0, 0)], np.array([], TOKEN)  # counts: tokens and bytes of every piece
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val:
        for text in read_pieces(path):
            try:
                data, ids = text.encode(), tokenizer.encode(text)
            except ValueError as error:
                raise UserError(f"{path} cannot be written in these tokens: {error}") from None
            if isinstance(tokenizer, SubwordTokenizer) and text_after(last, ids, tokenizer) != text:
                raise UserError(f"{path} cannot be written in these tokens: they do not give it back")
            last = ids[-1:]
            digest.update(data)
            counts.append((len(ids), len(data)))
            train.write(ids)
        ends = np.cumsum(counts, axis=0)
        n_tokens, n_bytes = ends[-1].tolist()
        if not n_tokens:
            raise UserError(f"{path} is empty: there is nothing to learn from")
        n_train = int(n_tokens * (1 - val_fraction))
        token_end, byte_end = ends[np.searchsorted(ends[:, 0], n_train)].tolist()  # of the piece that is divided
        train.seek(n_train * TOKEN.itemsize)
        divided = tokenizer.decode(np.frombuffer(train.read((token_end - n_train) * TOKEN.itemsize), TOKEN))
        train.seek(n_train * TOKEN.itemsize)
        shutil.copyfileobj(train, val, PIECE)
        train.truncate(n_train * TOKEN.itemsize)
        (folder / "meta.json").unlink(missing_ok=True)  # until the new one, the folder is not complete
    return {
        "train_tokens": n_train,
        "val_tokens": n_tokens - n_train,
        "val_bytes": n_bytes - byte_end + len(divided.encode()),
        "sha256": digest.hexdigest(),
    }


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place, flushed to disk, when the block ends; if it fails, nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk, say
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


# The tokens


class CharTokenizer:
    """Every distinct character is a token; ids follow the order of the code points."""

    def __init__(self, chars: str):
        self.chars = chars
        self.vocab_size = len(chars)
        self.points = code_points(chars)
        self.id_of = np.full(sys.maxunicode + 1, -1, np.int32)
        self.id_of[self.points] = np.arange(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Token ids (uint16). Raises ValueError that names the first character outside the vocabulary."""
        ids = self.id_of.take(code_points(text))
        if len(ids) and ids.min() < 0:
            at = int(np.argmax(ids < 0))
            raise ValueError(f"character {text[at]!r} at position {at} is not in the vocabulary")
        return ids.astype(TOKEN)

    def decode(self, ids: np.ndarray) -> str:
        return characters(self.points[ids])

    def to_dict(self) -> dict:
        return {"tokenizer": "char", "vocab_size": self.vocab_size, "chars": self.chars}

    def to_library(self) -> Any:
        """The same as a Tokenizer of Hugging Face's library `tokenizers`."""
        tokenizers = extra("tokenizers")
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel({char: id for id, char in enumerate(self.chars)}))
        library.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        library.decoder = tokenizers.decoders.Fuse()
        return library


class TokenizerError(UserError, ValueError):
    """What the library `tokenizers` raises, panics of its Rust included, has no class of its own."""


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"tokenizers says: {error}") from None


class SubwordTokenizer:
    """What Hugging Face's library `tokenizers` makes of a text: GPT-2's tokens, a BPE learned here, any tokenizer.json.

    `library` is its Tokenizer, or its whole tokenizer.json. Raises ValueError for one that cannot be used.
    """

    def __init__(self, name: str, library: Any):
        tokenizers = extra("tokenizers")
        with tokenizer_errors():
            self.library = tokenizers.Tokenizer.from_str(library) if isinstance(library, str) else library
            self.library.no_padding()
            self.library.no_truncation()
            self.library.post_processor = None  # which only adds tokens to those of the text
        self.name = name
        self.vocab_size = max(self.library.get_vocab().values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"it has {self.vocab_size:,} tokens; uint16 can tell {MAX_VOCAB_SIZE:,} apart")

    def encode(self, text: str) -> np.ndarray:
        """Token ids (uint16); a long text is divided among all cores. Raises ValueError for one that has none."""
        with tokenizer_errors():
            encodings = self.library.encode_batch_fast(PARTS.findall(text), add_special_tokens=False)
            return np.array([id for encoding in encodings for id in encoding.ids], TOKEN)

    def decode(self, ids: np.ndarray) -> str:
        with tokenizer_errors():
            return self.library.decode(ids.tolist(), skip_special_tokens=False)

    def to_dict(self) -> dict:
        return {"tokenizer": self.name, "vocab_size": self.vocab_size, "json": self.library.to_str()}

    def to_library(self) -> Any:
        return self.library


Tokenizer = CharTokenizer | SubwordTokenizer


def make_tokenizer(config: PrepareConfig, text: Path) -> Tokenizer:
    """The tokenizer that the config names; `char` and `bpe` are made for the text."""
    if config.tokenizer == "char":
        return all_characters(text)
    if config.tokenizer == "bpe":
        return learned_bpe(text, config.vocab_size or 512)
    if config.tokenizer == "gpt2":
        return tokenizer_of({"tokenizer": "gpt2"})
    try:
        content = Path(config.tokenizer).read_text(encoding="utf-8")
        facts = json.loads(content)
        return tokenizer_of(facts) if "tokenizer" in facts else SubwordTokenizer(config.tokenizer, content)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"--tokenizer={config.tokenizer}: {type(error).__name__}: {error}") from None


def all_characters(path: Path) -> CharTokenizer:
    """Read the text once for the characters that it has."""
    seen = np.zeros(sys.maxunicode + 1, bool)
    for text in read_pieces(path):
        counts = np.bincount(code_points(text))  # takes half as long as seen[points] = True
        seen[: len(counts)] |= counts > 0
    if seen.sum() > MAX_VOCAB_SIZE:
        raise UserError(
            f"{path} has {seen.sum():,} distinct characters; uint16 tokens can tell {MAX_VOCAB_SIZE:,} apart"
        )
    return CharTokenizer(characters(np.flatnonzero(seen)))


def learned_bpe(path: Path, vocab_size: int) -> SubwordTokenizer:
    """Byte-pair encoding of the text (Sennrich et al., 2016), from single bytes up as in GPT-2, so of any text.

    Of a long text it reads pieces at equal distances, for it keeps every different word in memory.
    """
    tokenizers = extra("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        max_token_length=32,  # bytes; where no blank divides a text, tokens would otherwise be whole passages of it
        show_progress=sys.stderr.isatty(),
    )
    pieces = itertools.islice(read_pieces(path), 0, None, 1 + path.stat().st_size // LEARN_FROM)
    parts = (part for text in pieces for part in PARTS.findall(text))  # small, for it collects 256 of them
    library.train_from_iterator(parts, trainer)
    return SubwordTokenizer("bpe", library)


def tokenizer_of(facts: dict) -> Tokenizer:
    """The tokenizer that meta.json or a checkpoint describes. Raises UserError if unknown, ValueError if damaged."""
    name = facts["tokenizer"]
    if name == "char":
        chars = facts["chars"]
        if not isinstance(chars, str) or not len(set(chars)) == len(chars) == facts["vocab_size"]:
            raise ValueError("chars must be as many different characters as vocab_size says")
        return CharTokenizer(chars)
    if isinstance(facts.get("json"), str):
        return SubwordTokenizer(name, facts["json"])
    if name != "gpt2":
        raise UserError(
            f"tokenizer {name!r} is not supported; there are 'char', 'gpt2' and any with its tokenizer.json"
        )
    tokenizers = extra("tokenizers")
    try:
        library = tokenizers.Tokenizer.from_pretrained("gpt2")
    except Exception as error:  # the hub's library has many
        raise UserError(
            f"cannot get GPT-2's tokenizer from the Hugging Face hub ({type(error).__name__}); "
            "prepare.py --tokenizer=FILE takes its tokenizer.json"
        ) from None
    return SubwordTokenizer("gpt2", library)


def first_token(tokenizer: Tokenizer) -> int:
    """What a text without a beginning begins with: a line break, or what comes closest."""
    try:
        return int(tokenizer.encode("\n")[0])
    except (ValueError, IndexError):
        return 0


def decoded_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come; a character may take several of them."""
    before, new = [], []
    for id in ids:
        new.append(id)
        text = text_after(before, new, tokenizer)
        if text and not text.endswith("\ufffd"):  # which stands for bytes that are no character yet
            yield text
            before, new = new, []
    if new:
        yield text_after(before, new, tokenizer)


def text_after(before: list[int] | np.ndarray, ids: list[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens that follow `before`: some tokenizers drop the blank of the very first one."""
    before = np.array(before, TOKEN)
    return tokenizer.decode(np.concatenate((before, np.array(ids, TOKEN))))[len(tokenizer.decode(before)) :]


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def characters(points: np.ndarray) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le")


# Reading it back


def load_meta(dataset: str) -> dict:
    """The checked content of meta.json. Raises UserError when it is damaged."""
    path = dataset_folder(dataset) / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        if meta["tokenizer"] == "char":  # any other one is of no concern before there is a text to encode
            tokenizer_of(meta)
        for name, value, limit in (
            ("vocab_size", meta["vocab_size"], MAX_VOCAB_SIZE),
            ("val_bytes", meta.get("val_bytes", 1), 2**63),  # not known of tokens that came ready
        ):
            if type(value) is not int or not 0 < value <= limit:
                raise ValueError(f"{name} must be from 1 to {limit}, found {value}")
        return meta
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare.py makes it anew") from None


def token_file(dataset: str, split: str, meta: dict) -> tuple[Path, int]:
    """The file of split "train" or "val" and its number of tokens. Raises UserError if meta.json promises others."""
    path = dataset_folder(dataset) / f"{split}.bin"
    n_tokens, rest = divmod(path.stat().st_size, TOKEN.itemsize)
    if rest:
        raise UserError(f"{path} is damaged: {path.stat().st_size} bytes are no whole number of uint16 tokens")
    promised = meta.get(f"{split}_tokens", n_tokens)
    if n_tokens != promised:
        raise UserError(f"{path} is damaged: it holds {n_tokens} tokens, meta.json promises {promised}")
    return path, n_tokens


if __name__ == "__main__":
    run(main)
