"""Text to tokens: fetch a text, number its characters, write data/<dataset>/{input.txt,train.bin,val.bin,meta.json}.

Knows text and files; knows nothing of models. Works in pieces, so that memory does not grow with the text.

    python prepare.py                                     Tiny Shakespeare
    python prepare.py --dataset=mine --input=mine.txt     any UTF-8 text
    python prepare.py --dataset=stdlib_char               the source of Python's standard library: no network needed
"""

import codecs
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlsplit

import numpy as np

from config import ConfigError, UserError, key, read, run

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TOKEN = np.dtype("<u2")  # a .bin is nothing but these: little-endian uint16, the layout that nanoGPT uses too
MAX_VOCAB_SIZE = 2**16
PIECE = 2**20  # bytes of text in memory at a time
TIMEOUT = (10, 30)  # seconds to connect, and of silence during a download
ATTEMPTS = 4  # with 1, 2 and 4 seconds between them


@dataclass
class PrepareConfig:
    """Turn a text into the tokens that train.py reads: data/<dataset>/train.bin, val.bin and meta.json."""

    dataset: str = key("shakespeare_char", "folder under data/ to write")
    input: str | None = key(None, "a file to prepare: any UTF-8 text")
    url: str | None = key(None, "a text to download and prepare")
    val_fraction: float = key(0.1, "share of the tokens kept for validation: the last ones")
    tokenizer: Literal["char"] = key("char", "what a token is")

    def __post_init__(self):
        dataset_folder(self.dataset)
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
    tokenizer, n_tokens, sha256 = survey(folder / "input.txt")
    (folder / "meta.json").unlink(missing_ok=True)
    n_train = int(n_tokens * (1 - config.val_fraction))
    encode_file(tokenizer, folder / "input.txt", n_train)
    counts = {"train_tokens": n_train, "val_tokens": n_tokens - n_train}
    meta = tokenizer.to_dict() | counts | {"source": source, "sha256": sha256}
    with replacing(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    print(
        f"{folder}: {tokenizer.vocab_size} characters, "
        f"{meta['train_tokens']:,} train tokens, {meta['val_tokens']:,} validation tokens"
    )


def dataset_folder(dataset: str) -> Path:
    """data/<dataset>; raises ConfigError for a name that could lead out of data/."""
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        raise ConfigError(f"dataset must be a plain folder name (letters, digits, _ - .), found {dataset!r}")
    return Path("data") / dataset


# The text


def fetch(config: PrepareConfig, path: Path) -> str:
    """Put the text at `path`, unless it is there already; return where it came from."""
    if config.input:
        if not os.path.isfile(config.input):
            raise ConfigError(f"--input: there is no file {config.input}")
        if not (path.exists() and path.samefile(config.input)):
            with open(config.input, "rb") as text, replacing(path) as file:
                shutil.copyfileobj(text, file, PIECE)
        return config.input
    if config.url:
        download(config.url, path)
        return config.url
    if path.exists():
        return str(path)
    if config.dataset == "shakespeare_char":
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
        "--input=FILE; or, with no network at all, python train.py config/stdlib_char.py"
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


def read_pieces(path: Path) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yield the file piece by piece: its bytes, and the code points (uint32) of the characters that end in them."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while True:
            data = file.read(PIECE)
            try:
                yield data, code_points(decoder.decode(data, final=not data))
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                raise UserError(f"{path} is not UTF-8 text: byte {at:,} is {error.object[error.start]:#x}") from None
            if not data:
                return


def survey(path: Path) -> tuple["CharTokenizer", int, str]:
    """Read the text once: its tokenizer, how many tokens it has, its sha256."""
    seen, n_tokens, digest = np.zeros(sys.maxunicode + 1, bool), 0, hashlib.sha256()
    for data, points in read_pieces(path):
        counts = np.bincount(points)  # takes half as long as seen[points] = True
        seen[: len(counts)] |= counts > 0
        n_tokens += len(points)
        digest.update(data)
    if not n_tokens:
        raise UserError(f"{path} is empty: there is nothing to learn from")
    if seen.sum() > MAX_VOCAB_SIZE:
        raise UserError(
            f"{path} has {seen.sum():,} distinct characters; uint16 tokens can tell {MAX_VOCAB_SIZE:,} apart"
        )
    return CharTokenizer(characters(np.flatnonzero(seen))), n_tokens, digest.hexdigest()


def encode_file(tokenizer: "CharTokenizer", path: Path, n_train: int) -> None:
    """Write the first `n_train` tokens of the text to train.bin and the rest to val.bin beside it."""
    with replacing(path.with_name("train.bin")) as train, replacing(path.with_name("val.bin")) as val:
        for _, points in read_pieces(path):
            tokens = tokenizer.encode_points(points)
            train.write(tokens[:n_train])
            val.write(tokens[n_train:])
            n_train = max(0, n_train - len(tokens))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place, flushed to disk, when the block ends; if it fails, nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
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
        return self.encode_points(code_points(text))

    def encode_points(self, points: np.ndarray) -> np.ndarray:
        ids = self.id_of.take(points)
        if len(ids) and ids.min() < 0:
            at = int(np.argmax(ids < 0))
            raise ValueError(f"character {chr(points[at])!r} at position {at} is not in the vocabulary")
        return ids.astype(TOKEN)

    def decode(self, ids: np.ndarray) -> str:
        return characters(self.points[ids])

    def to_dict(self) -> dict:
        return {"tokenizer": "char", "vocab_size": self.vocab_size, "chars": self.chars}


def tokenizer_of(facts: dict) -> CharTokenizer:
    """The tokenizer that meta.json or a checkpoint describes. Raises UserError if unknown, ValueError if damaged."""
    if facts["tokenizer"] != "char":
        raise UserError(f"tokenizer {facts['tokenizer']!r} is not supported; there is 'char'")
    chars = facts["chars"]
    if not isinstance(chars, str) or not len(set(chars)) == len(chars) == facts["vocab_size"]:
        raise ValueError("chars must be as many different characters as vocab_size says")
    return CharTokenizer(chars)


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
        if type(meta["vocab_size"]) is not int or not 0 < meta["vocab_size"] <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be from 1 to {MAX_VOCAB_SIZE}, found {meta['vocab_size']}")
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
