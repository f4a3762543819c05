"""Turn a text into tokens: data/<dataset>/{input.txt,train.bin,val.bin,meta.json}, and read them back.

Works in pieces, so that memory does not grow with the text; knows nothing of models.

    python prepare.py                                     Tiny Shakespeare
    python prepare.py --dataset=mine --input=mine.txt     any UTF-8 text
    python prepare.py --dataset=stdlib_char               the source of Python's standard library: no network needed
    python prepare.py --dataset=mine --input=mine.txt --tokenizer=bpe --vocab_size=512     tokens, not characters
    python prepare.py --dataset=fineweb --shards=10       a billion of GPT-2's tokens of web pages
"""

import sys

if __name__ == "__main__":  # Ctrl-C during the imports shows no traceback
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

import codecs
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sysconfig
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from config import ConfigError, UserError, explained, key, progress, read, rewritable, run, show, typed

try:
    import fcntl
except ImportError:  # on Windows nothing is locked
    fcntl = None

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TOKEN = np.dtype("<u2")  # a .bin is a row of these: little-endian uint16, the layout that nanoGPT uses too
MAX_VOCAB_SIZE = 2**16
END = "<|endoftext|>"  # what GPT-2's tokenizer has between two texts
PIECE = 2**20  # bytes of text in memory at a time
PART = 2**14  # characters that one thread encodes at a time
LEARN_FROM = 2**26  # bytes of text, at most, that a BPE is learned from
# Texts are divided where a word ends, before a space: the tokens of the parts are those of the whole.
WORD_END = r"(?<=[^\W_])(?= )"
PARTS = re.compile(rf"(?s).{{1,{PART}}}{WORD_END}|.{{1,{PART}}}")
COMPRESSED = {
    b"\x1f\x8b": "gunzip", b"PK\x03\x04": "unzip -p", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"%PDF": "pdftotext - -",
}  # fmt: skip
# FineWeb's sample of 10 billion tokens (Penedo et al., 2024; ODC-By 1.0), in GPT-2's tokens, on the Hugging Face hub:
# shards of 100 million uint16, each after a header of 256 int32: this number, the version 1, how many tokens, zeros.
FINEWEB, SHARDS, SHARD_MAGIC, SHARD_HEADER = "kjj0/fineweb10B-gpt2", 103, 20240520, 1024
SHARD_BYTES = SHARD_HEADER + 2 * 100_000_000
GPT2_FACTS = {"tokenizer": "gpt2", "vocab_size": 50257}
TIMEOUT = (10, 30)  # seconds to connect, and of silence during a download
ATTEMPTS = 4  # with 1, 2 and 4 seconds between them


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
        dataset_folder(self.dataset)
        own = self.input or self.url or self.tokenizer not in ("auto", "gpt2")
        if self.dataset == "fineweb" and (own or self.drop_unknown or self.val_fraction != PrepareConfig.val_fraction):
            raise ValueError("fineweb is ready made, in GPT-2's tokens: take another --dataset for a text of your own")
        if self.shards and self.dataset != "fineweb":
            raise ValueError(f"shards needs --dataset=fineweb, found --dataset={self.dataset}")
        if self.tokenizer == "auto":
            self.tokenizer = "gpt2" if self.dataset.endswith("_gpt2") else "char"
        if self.tokenizer not in ("char", "bpe", "gpt2"):
            with explained(f"--tokenizer={self.tokenizer} is not usable", kind=ConfigError):
                tokenizer_facts(Path(self.tokenizer))
        if self.vocab_size and self.tokenizer != "bpe":
            raise ValueError(f"vocab_size needs --tokenizer=bpe, found --tokenizer={self.tokenizer}")
        if self.input and self.url:
            raise ValueError("give --input or --url, not both: a dataset is one text")


def main(argv: list[str]) -> None:
    prepare(read(PrepareConfig, argv))


def prepare(config: PrepareConfig, overwrite: bool = True) -> None:
    """Write the dataset; unless `overwrite`, leave a complete one alone.

    Another process that prepares the same dataset waits. meta.json comes last: a folder that has one is complete.
    """
    folder = dataset_folder(config.dataset)
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(f"{folder} is a link to {os.readlink(folder)}, which does not exist")
    with locked(folder / "lock", wait=True):
        if (folder / "meta.json").exists() and not overwrite:
            return
        facts = download_fineweb(config, folder) if config.dataset == "fineweb" else tokenize(config, folder)
        write_json(folder / "meta.json", facts)
    kind = "characters" if facts["tokenizer"] == "char" else "tokens"
    sizes = f"{facts['train_tokens']:,} train tokens, {facts['val_tokens']:,} validation tokens"
    show(f"{folder}: {facts['vocab_size']:,} {kind}, {sizes}")
    if facts["vocab_size"] < (config.vocab_size or 0):
        show(f"the text has no more frequent strings: fewer tokens than --vocab_size={config.vocab_size}")
    if min(facts["train_tokens"], facts["val_tokens"]) <= 8:  # config/lecture has the shortest blocks
        show("too short for every recipe here, even for --block_size=8: take a longer text")


def prepared(dataset: str) -> dict:
    """meta.json of the dataset, which is prepared first where it is missing."""
    if not (dataset_folder(dataset) / "meta.json").exists():
        prepare(PrepareConfig(dataset=dataset), overwrite=False)
    return load_meta(dataset)


def dataset_folder(dataset: str) -> Path:
    """data/<dataset>; raises ConfigError for a name that could lead out of data/."""
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        raise ConfigError(f"dataset must be a plain folder name (letters, digits, _ - .), found {dataset!r}")
    return Path("data") / dataset


# The text


def tokenize(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Write input.txt, train.bin and val.bin of a text; returns what meta.json says of them."""
    before = {}
    with suppress(UserError, FileNotFoundError):  # damaged, or the first text
        before = load_meta(config.dataset)
    text, source = fetch(config, folder / "input.txt")
    try:
        counts = count_characters(text)
        tokenizer = make_tokenizer(config, text, counts)
        facts = encode_file(tokenizer, text, config, counts)
    finally:
        (folder / "joined.txt").unlink(missing_ok=True)
    if before.get("sha256", facts["sha256"]) != facts["sha256"]:
        show(f"{folder}: the text before, of {before.get('source')}, is replaced")
    return tokenizer.facts | facts | {"source": source}


def fetch(config: PrepareConfig, path: Path) -> tuple[Path, str]:
    """The file of the text, by default `path`, and where it came from; downloaded where needed."""
    if config.input:
        return given_text(config, path.with_name("joined.txt")), config.input
    source = config.url or str(path)
    ways = (
        f". Either put the file at {path}; or python prepare.py --dataset={config.dataset} --input=FILE; "
        "or, with no network at all, python train.py config/stdlib_char.py"
    )
    if config.url:
        download(config.url, path, ways)
    elif path.exists():
        pass
    elif config.dataset in ("shakespeare_char", "shakespeare_gpt2"):
        download(source := SHAKESPEARE_URL, path, ways, sha256=SHAKESPEARE_SHA256)
    elif config.dataset == "stdlib_char":
        source = collect_stdlib(path)
    elif path.with_name("train.bin").exists():
        facts = f'{json.dumps(GPT2_FACTS)} or {{"tokenizer": "char", "vocab_size": N, "chars": "..."}}'
        raise ConfigError(f"{path.parent} has tokens but no meta.json, which must say what they mean: {facts}")
    else:
        raise ConfigError(f"there is no {path}: python prepare.py --dataset={config.dataset} --input=FILE makes it")
    return path, source


def given_text(config: PrepareConfig, path: Path) -> Path:
    """The file that --input names; a folder's texts joined and a pipe, which can be read only once, are put at `path`.

    Between two texts of a folder is a newline, or GPT-2's token for it, <|endoftext|>.
    """
    given = Path(config.input)
    if given.is_file():
        return given
    texts = sorted(path for path in given.iterdir() if path.suffix.lower() == ".txt") if given.is_dir() else [given]
    if not given.exists() or not texts:
        hint = f", did you mean {typed('url', config.input)}?" if "://" in config.input else ""
        raise ConfigError(f"--input: there is no {'.txt file in' if given.exists() else 'file'} {config.input}{hint}")
    show(f"{given}: {len(texts)} .txt files" if given.is_dir() else f"{given}: read until it ends")
    with replacing(path) as file:
        for text in texts:
            if text != texts[0]:
                file.write(END.encode() if config.tokenizer == "gpt2" else b"\n")
            for piece in read_pieces(text):
                file.write(piece.encode())
    return path


class Meter:
    """Shows how much of a file or a download is done: bytes, rate and, where the `total` is known, the time left."""

    def __init__(self, what: str, total: int = 0):
        self.what, self.total, self.done, self.start = what, total, 0, time.monotonic()

    def add(self, n_bytes: int) -> None:
        self.done += n_bytes
        seconds = time.monotonic() - self.start
        if seconds > 1 and self.done:  # what takes less needs no progress
            rate, size, left = self.done / seconds, f"{self.done / 1e6:,.0f}", ""
            if self.total:
                size += f" of {self.total / 1e6:,.0f}"
                left = f" | eta {timedelta(seconds=round((self.total - self.done) / rate))}"
            progress.show(f"{self.what}: {size} MB | {rate / 1e6:,.1f} MB/s{left}")


def download(url: str, path: Path, advice: str, meter: Meter | None = None, sha256: str | None = None) -> None:
    """Download `url` to `path`. Overload and broken connections are tried again; raises UserError when all fails."""
    import requests  # a tenth of a second, which only a download should cost

    if not meter:
        show(f"downloading {url}")
        meter = Meter(f"downloading {path}")
    before = meter.done
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT) as response:
                if response.ok:
                    meter.done = before
                    return save(response.iter_content(PIECE), path, meter, sha256)
                problem = f"the server answered {response.status_code} {response.reason}"
                if response.status_code < 500 and response.status_code != 429:
                    break
        except ValueError as error:  # a wrong address, or wrong content
            problem = str(error)
            break
        except requests.RequestException as error:
            problem = f"the connection failed {attempt + 1} times ({type(error).__name__})"
    raise UserError(f"cannot download {url}: {problem}{advice}")


def save(pieces: Iterator[bytes], path: Path, meter: Meter, sha256: str | None) -> None:
    """Write the pieces to `path`. Raises ValueError when their hash is not `sha256`."""
    digest = hashlib.sha256()
    with replacing(path) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            meter.add(len(piece))
        if sha256 and digest.hexdigest() != sha256:
            found = f"{file.tell():,} bytes of sha256 {digest.hexdigest()}"
            raise ValueError(f"wrong content: {found}, expected {sha256}")


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
    """Yield the text piece by piece, each up to where a word ends. Raises UserError if it is not UTF-8."""
    decoder, text, data, head = codecs.getincrementaldecoder("utf-8-sig")(), "", None, b""
    meter = Meter(f"reading {path}", path.stat().st_size)
    with open(path, "rb") as file:
        while data != b"":
            data = file.read(PIECE)
            meter.add(len(data))
            head = head or data
            try:
                text += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = file.tell() - len(error.object) + error.start
                raise not_a_text(path, f"byte {at:,} is {error.object[error.start]:#x}", head) from None
            *parts, text = PARTS.findall(text) or [""]
            yield "".join(parts)  # the last part waits: its word may go on
    yield text


def not_a_text(path: Path, found: str, head: bytes) -> UserError:
    """What `found` says against the file being UTF-8 text, and what its first bytes tell of what it is."""
    advice = "convert it from its encoding, for instance: iconv -f WINDOWS-1252"
    zeros = [head[i::4].count(0) > len(head) // 64 for i in range(4)]  # often, at each place of four bytes
    if any(zeros) or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        little = zeros[3] if any(zeros) else head.startswith(codecs.BOM_UTF16_LE)
        wide = (zeros[0] and zeros[1]) or (zeros[2] and zeros[3])
        advice = f"convert it: iconv -f UTF-{32 if wide else 16}{'LE' if little else 'BE'}"
    advice += f" -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
    for magic, program in COMPRESSED.items():
        if head.startswith(magic):
            way = "" if program.startswith("unzip") else "< "  # the others look at the name
            advice = f"it seems to be compressed: {program} {way}{shlex.quote(str(path))} > text.txt"
    return UserError(f"{path} is not UTF-8 text: {found}; {advice}")


def count_characters(path: Path) -> np.ndarray:
    """How often the text has each code point (0x110000,). Raises UserError when it is empty."""
    counts, head = np.zeros(sys.maxunicode + 1, np.int64), ""
    for piece in read_pieces(path):
        head = head or piece
        found = np.bincount(code_points(piece))
        counts[: len(found)] += found
    if counts[0] > max(100, counts.sum() / 50):  # UTF-16 of English is valid UTF-8, every second character of it NUL
        raise not_a_text(path, f"{counts[0]:,} of its {counts.sum():,} characters are NUL", head.encode())
    if not counts.any():
        raise UserError(f"{path} is empty: there is nothing to learn from")
    return counts


def encode_file(tokenizer: "Tokenizer", text: Path, config: PrepareConfig, counts: np.ndarray) -> dict[str, Any]:
    """Write train.bin and val.bin, then input.txt; returns facts of them. `counts`: of each code point in the text.

    The text is split, not the tokens: all tokenizers hold back the same text, so their bits per byte are comparable.
    """
    folder = dataset_folder(config.dataset)
    unknown = np.flatnonzero(counts * tokenizer.lacks).tolist()
    lacking = f"the vocabulary lacks {counts[unknown].sum():,} of its {counts.sum():,} characters: "
    lacking += ", ".join(map(shown, unknown[:8]))
    advice = f"; {lacking}: --drop_unknown=True leaves them out" if unknown else ""
    if unknown and config.drop_unknown:
        show(f"{text}: {lacking}: left out")
        counts[unknown] = 0
    dropped = dict.fromkeys(unknown if config.drop_unknown else [])
    n_train = int(counts.sum() * (1 - config.val_fraction))
    n_tokens, val_bytes, digest, start = {"train": 0, "val": 0}, 0, hashlib.sha256(), 0
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val:
        for piece in read_pieces(text):
            piece = piece.translate(dropped) if dropped else piece  # slow
            digest.update(piece.encode())
            border = min(max(n_train - start, 0), len(piece))  # between training and validation
            for split, file, first, last in (("train", train, 0, border), ("val", val, border, len(piece))):
                part = piece[first:last]
                with explained(f"{text} cannot be written in these tokens", advice):
                    ids = tokenizer.encode(part, start + first)
                    # Some tokenizers drop the very first space.
                    if config.tokenizer != "char" and tokenizer.decode(ids).lstrip(" ") != part.lstrip(" "):
                        raise ValueError("decoding them does not return it")
                file.write(ids)
                n_tokens[split] += len(ids)
            val_bytes += len(piece[border:].encode())
            start += len(piece)
        if not all(n_tokens.values()):
            raise UserError(f"{text} is too short for --val_fraction={config.val_fraction}: a split has no token")
        if text != folder / "input.txt":
            with open(text, "rb") as given, replacing(folder / "input.txt") as file:
                shutil.copyfileobj(given, file, PIECE)
        (folder / "meta.json").unlink(missing_ok=True)  # until the new one, the folder is not complete
    sizes = {f"{split}_tokens": n for split, n in n_tokens.items()}
    return sizes | {"val_bytes": val_bytes, "sha256": digest.hexdigest()}


# FineWeb


def download_fineweb(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Write val.bin and add the shards that train.bin lacks; returns what meta.json says of them.

    shards.json has the number of tokens of each whole shard in train.bin. What comes after them there, an interrupted
    download has left; and meta.json may speak of fewer shards than there are.
    """
    record, train, val = folder / "shards.json", folder / "train.bin", folder / "val.bin"
    n_shards = config.shards or SHARDS
    with explained(f"{record} is damaged", f"; remove it and {train}"):
        counts = json.loads(record.read_bytes()) if record.exists() else []
        if not isinstance(counts, list) or any(type(count) is not int or count <= 0 for count in counts):
            raise ValueError("it must hold the number of tokens of each shard")
        while 2 * sum(counts) > (train.stat().st_size if train.exists() else 0):
            counts.pop()
    if not record.exists():
        if train.exists() or val.exists():
            raise UserError(f"{folder} has tokens but no shards.json, which says of what: move {train} and {val} away")
        write_json(record, [])
    with suppress(UserError, KeyError, FileNotFoundError):
        if val.stat().st_size != 2 * load_meta(config.dataset)["val_tokens"]:
            val.unlink()  # it is damaged
    missing = max(0, n_shards - len(counts)) + (not val.exists())
    needed, free = (missing + 1) * SHARD_BYTES * bool(missing), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f}: try fewer --shards")
    if missing:
        show(f"{folder}: {n_shards} of FineWeb's {SHARDS} shards, {missing * SHARD_BYTES / 1e9:.1f} GB to download")
    meter = Meter("downloading FineWeb", missing * SHARD_BYTES)
    if not val.exists():
        with replacing(val) as file:
            add_shard("fineweb_val_000000.bin", file, folder, meter)
    write_json(record, counts)
    while len(counts) < n_shards:
        with named(train), open(train, "ab") as file:
            file.truncate(2 * sum(counts))
            counts.append(add_shard(f"fineweb_train_{len(counts) + 1:06}.bin", file, folder, meter))
            flush_to_disk(file)
        write_json(record, counts)
    digest = hashlib.sha256(f"{n_shards} shards".encode())
    digest.update(np.memmap(val, mode="r"))
    sizes = {"train_tokens": sum(counts[:n_shards]), "val_tokens": val.stat().st_size // 2, "shards": n_shards}
    return GPT2_FACTS | sizes | {"sha256": digest.hexdigest(), "source": f"huggingface.co/datasets/{FINEWEB}"}


def add_shard(name: str, file: IO[bytes], folder: Path, meter: Meter) -> int:
    """Download a shard and append its tokens to `file`; returns how many. Raises UserError for a damaged one."""
    path, url = folder / "shard.bin", f"{hub()}/datasets/{FINEWEB}/resolve/main/{name}"
    advice = "; the same command tries again, from this shard on"
    try:
        download(url, path, advice, meter)
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
    """A file beside `path` that takes its place, flushed to disk, when the block ends; if it fails, nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with named(path), open(beside, "wb") as file:
            yield file
            flush_to_disk(file)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def named(path: Path) -> Iterator[None]:
    """A system error that names no file, as that of a full disk does, names `path`."""
    try:
        yield
    except BaseException as error:
        for cause in (error, error.__context__):  # on a full disk torch.save adds an error of its own
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
    """Keep other processes out of the folder of `path` until the block ends: they wait, or get a UserError.

    The OS releases the lock when the process exits, even after SIGKILL. The file stays: removing it would race.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"{path.parent} is in use by another run, process {file.read()}"
            if not wait:
                raise UserError(f"{holder}: let it end, or take another --out_dir") from None
            print(f"{holder}: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        yield


# The tokens


def shown(code_point: int) -> str:
    """A character in a message, by its number where it cannot be seen alone."""
    char = chr(code_point)
    visible = char.isprintable() and not unicodedata.category(char).startswith("M")  # no combining mark
    return repr(char) if visible else f"U+{code_point:04X}"


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")  # refuses lone surrogates, which are no characters


class CharTokenizer:
    """Every distinct character is a token; ids follow the order of the code points."""

    end = None  # no token ends a text

    def __init__(self, chars: str):
        self.facts = {"tokenizer": "char", "vocab_size": len(chars), "chars": chars}  # for meta.json
        self.vocab_size = len(chars)
        self.points = code_points(chars)
        self.id_of = np.full(sys.maxunicode + 1, -1, np.int32)
        self.id_of[self.points] = np.arange(self.vocab_size)
        self.lacks = self.id_of < 0  # by code point

    def encode(self, text: str, start: int = 0) -> np.ndarray:
        """Token ids (uint16). Raises ValueError that names the first character outside the vocabulary, and its
        position in a text of which this is the part from `start` on.
        """
        ids = self.id_of.take(code_points(text))
        if len(ids) and ids.min() < 0:
            at = int(np.argmax(ids < 0))
            raise ValueError(f"character {shown(ord(text[at]))} at position {start + at} is not in the vocabulary")
        return ids.astype(TOKEN)

    def decode(self, ids: np.ndarray) -> str:
        return self.points[ids].tobytes().decode("utf-32-le")

    def to_library(self) -> Any:
        """The same as a Tokenizer of Hugging Face's library `tokenizers`."""
        import tokenizers

        ids = {char: id for id, char in enumerate(self.facts["chars"])}
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
        library.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        library.decoder = tokenizers.decoders.Fuse()
        return library


class SubwordTokenizer:
    """What Hugging Face's library `tokenizers` makes of a text: GPT-2's tokens, a BPE learned here, any tokenizer.json.

    `library` is its Tokenizer, or its whole tokenizer.json. Raises many types of exceptions for an unusable one.
    """

    lacks = False  # no character, as far as one can tell before

    def __init__(self, name: str, library: Any):
        import tokenizers

        self.library = tokenizers.Tokenizer.from_str(library) if isinstance(library, str) else library
        self.library.no_padding()
        self.library.no_truncation()
        self.library.post_processor = None  # it only adds tokens to those of the text
        self.vocab_size = max(self.library.get_vocab().values(), default=-1) + 1
        self.facts = {"tokenizer": name, "vocab_size": self.vocab_size, "json": self.library.to_str()}
        special = {token.content: id for id, token in self.library.get_added_tokens_decoder().items() if token.special}
        self.end = special.get(END)
        if not 0 < self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"it has {self.vocab_size:,} tokens; uint16 can tell {MAX_VOCAB_SIZE:,} apart")

    @explained("the tokenizer cannot encode this text")
    def encode(self, text: str, start: int = 0) -> np.ndarray:
        """Token ids (uint16); a long text is divided among all cores. Raises UserError for one that has none."""
        encodings = self.library.encode_batch_fast(PARTS.findall(text), add_special_tokens=False)
        return np.array([id for encoding in encodings for id in encoding.ids], TOKEN)

    @explained("the tokenizer cannot decode these tokens")
    def decode(self, ids: np.ndarray) -> str:
        return self.library.decode(ids.tolist(), skip_special_tokens=False)

    def to_library(self) -> Any:
        return self.library


Tokenizer = CharTokenizer | SubwordTokenizer


def make_tokenizer(config: PrepareConfig, text: Path, counts: np.ndarray) -> Tokenizer:
    """The tokenizer that the config names; `char` and `bpe` are made for the text."""
    if config.tokenizer == "char":
        if (n_chars := np.count_nonzero(counts)) > MAX_VOCAB_SIZE:
            raise UserError(f"{text} has {n_chars:,} distinct characters; uint16 can tell {MAX_VOCAB_SIZE:,} apart")
        return CharTokenizer("".join(map(chr, np.flatnonzero(counts))))
    if config.tokenizer == "bpe":
        return learned_bpe(text, config.vocab_size or 512)
    with explained(f"--tokenizer={config.tokenizer} is not usable", kind=ConfigError):
        gpt2 = config.tokenizer == "gpt2"
        return tokenizer_of({"tokenizer": "gpt2"} if gpt2 else tokenizer_facts(Path(config.tokenizer)))


def tokenizer_facts(path: Path) -> dict:
    """What a checkpoint, a tokenizer.json, the folder of one, or a meta.json says. Raises ConfigError for none."""
    for file in (path / "best.pt", path / "ckpt.pt", path):
        if file.suffix == ".pt" and file.is_file():
            import torch

            checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            if "tokenizer" not in checkpoint:  # nanoGPT's
                raise ValueError("it does not say what its tokens mean: take gpt2 or its dataset's meta.json")
            return checkpoint["tokenizer"]
    if (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file():  # an older format
        quiet_hub(needed=False)
        import transformers

        theirs = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return {"tokenizer": str(path), "json": theirs.backend_tokenizer.to_str()}
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        ways = "char, bpe, gpt2, a tokenizer.json, its folder or a meta.json, or a checkpoint"
        raise ConfigError(f"there is no tokenizer {path}: take {ways}")
    content = path.read_text(encoding="utf-8")
    facts = json.loads(content)
    if "tokenizer" in facts:
        return facts
    vocab = facts.get("model", {}).get("vocab")
    if isinstance(vocab, dict) and len(vocab) <= MAX_VOCAB_SIZE and all(len(token) == 1 for token in vocab):
        tokenizer = CharTokenizer("".join(sorted(vocab, key=vocab.get)))
        if json.loads(tokenizer.to_library().to_str()) == facts:  # an export of sample.py
            return tokenizer.facts
    return {"tokenizer": str(path), "json": content}


def learned_bpe(path: Path, vocab_size: int) -> SubwordTokenizer:
    """Byte-pair encoding of the text (Sennrich et al., 2016), from single bytes up as in GPT-2, so of any text.

    Of a long text it reads pieces at equal distances, for it keeps every different word in memory.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,  # bytes; in a text without spaces, tokens would otherwise be whole passages
        show_progress=rewritable(sys.stderr),
    )
    pieces = itertools.islice(read_pieces(path), 0, None, 1 + path.stat().st_size // LEARN_FROM)
    parts = (part for piece in pieces for part in PARTS.findall(piece))  # small, for it collects 256 of them
    library.train_from_iterator(parts, trainer)
    return SubwordTokenizer("bpe", library)


def tokenizer_of(facts: dict) -> Tokenizer:
    """The tokenizer that meta.json or a checkpoint describes. Raises many types of exceptions for an unusable one."""
    name = facts["tokenizer"]
    if name == "char":
        chars = facts["chars"]
        if not isinstance(chars, str) or not len(set(chars)) == len(chars) == facts["vocab_size"]:
            raise ValueError("chars must be as many different characters as vocab_size says")
        return CharTokenizer(chars)
    if isinstance(facts.get("json"), str):
        return SubwordTokenizer(name, facts["json"])
    if name != "gpt2":
        known = "'char', 'gpt2' and any with its tokenizer.json"
        raise UserError(f"tokenizer {name!r} is not supported; there are {known}")
    quiet_hub(needed=True)
    import tokenizers

    advice = "; prepare.py --tokenizer=FILE takes its tokenizer.json"
    with explained("cannot get GPT-2's tokenizer from the Hugging Face hub", advice):
        return SubwordTokenizer("gpt2", tokenizers.Tokenizer.from_pretrained("gpt2"))


def hub() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def quiet_hub(needed: bool) -> None:
    """Before transformers is imported: no warnings, no bars and, where the Hugging Face hub is away, no attempts."""
    import requests

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if needed:
            requests.head(hub(), timeout=5)
    except requests.RequestException:
        os.environ["HF_HUB_OFFLINE"] = "1"  # from its cache, or an error at once, not after 24 seconds


def first_token(tokenizer: Tokenizer) -> int:
    """The default prompt: a newline, else token 0."""
    try:
        return int(tokenizer.encode("\n")[0])
    except (UserError, ValueError, IndexError):
        return 0


def decoded_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come; a character may take several of them."""

    def text_after(before: list[int], new: list[int]) -> str:
        # Decoded together, for some tokenizers drop the space of the very first token.
        together, before = (tokenizer.decode(np.array(tokens, TOKEN)) for tokens in (before + new, before))
        return together[len(before) :]

    before, new = [], []
    for id in ids:
        new.append(id)
        text = text_after(before, new)
        if text and not text.endswith("\ufffd"):  # which stands for bytes that are no character yet
            yield text
            before, new = new, []
    if new:
        yield text_after(before, new)


# Reading it back


def load_meta(dataset: str) -> dict:
    """The content of meta.json, checked. Raises UserError when it is damaged."""
    path = dataset_folder(dataset) / "meta.json"
    with explained(f"{path} is damaged", "; prepare.py makes it anew"):
        meta = json.loads(path.read_bytes())
        if meta["tokenizer"] == "char":  # any other one is only needed when there is a text to encode
            tokenizer_of(meta)
        val_bytes = meta.get("val_bytes", 1)  # unknown for tokens that were not made here
        for name, value, limit in (("vocab_size", meta["vocab_size"], MAX_VOCAB_SIZE), ("val_bytes", val_bytes, 2**63)):
            if type(value) is not int or not 0 < value <= limit:
                raise ValueError(f"{name} must be from 1 to {limit}, found {value}")
        return meta


class Tokens:
    """One split of a dataset, "train" or "val", memory-mapped: only what is used is read from disk.

    Raises UserError for a damaged file and for one that is too short for `block_size`.
    """

    def __init__(self, dataset: str, split: str, meta: dict, block_size: int):
        self.path = dataset_folder(dataset) / f"{split}.bin"
        self.vocab_size = meta["vocab_size"]
        self.n_bytes = meta.get(f"{split}_bytes")  # of its text, where that is known
        with explained(f"{self.path} is damaged", "; prepare.py makes it anew"):
            promised = meta.get(f"{split}_tokens")
            growing = split == "train" and "shards" in meta  # train.bin may hold more shards than count
            self.ids = np.memmap(self.path, TOKEN, "r", 0, promised if growing else None)  # refuses half a token
            if promised not in (None, len(self)):
                raise ValueError(f"it holds {len(self)} tokens, meta.json promises {promised}")
        if len(self) <= block_size:
            needed = f"block_size {block_size} and a target: lower --block_size or prepare a longer text"
            raise UserError(f"{self.path} has {len(self)} tokens, too few for {needed}")

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each of `starts` (B,), and the one after them: ids (B, length + 1), int64.

        Raises OSError for an id outside the vocabulary: no embedding may be indexed with it.
        """
        rows = sliding_window_view(self.ids, length + 1)[starts].astype(np.int64)
        if rows.max() >= self.vocab_size:
            raise OSError(f"{self.path} has token id {rows.max()}; the vocabulary has {self.vocab_size} tokens")
        return rows


if __name__ == "__main__":
    run(main)
