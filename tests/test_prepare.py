"""What prepare.py promises to a user.

Any UTF-8 text, a file or a folder of them, becomes tokens from which it comes back exactly: the first 90 % of it in
train.bin, the rest in val.bin, little-endian uint16, and meta.json, written last, says what they mean. What cannot be
prepared is refused in a line and leaves the dataset of before as it was, as does a kill. A download is tried again
where that may help. Tokens are characters, those of a BPE learned from the text, or another model's. What is read back
is checked. FineWeb comes shard by shard, and goes on where it was interrupted.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import REPOSITORY, SHAKESPEARE, SHARD_TOKENS, ok, shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from config import ConfigError, UserError
from prepare import CharTokenizer, Tokens, decoded_stream, load_meta, tokenizer_of

TEXT = "Grüße, Jürgen ❤ 😀 Unicode!\r\nsecond line\n" * 50


def made(text, *argv):
    """Prepare `text` as the dataset "mine"; return its meta.json and its ids."""
    Path("my.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    prepare.main(["--dataset=mine", "--input=my.txt", *argv])
    return load_all("mine")


def load_all(dataset):
    meta = load_meta(dataset)
    return meta, np.concatenate([Tokens(dataset, split, meta, 0).ids for split in ("train", "val")])


def decoded(dataset="mine"):
    meta, ids = load_all(dataset)
    return tokenizer_of(meta).decode(ids)


def files():
    """All files of all datasets."""
    return {path.name: path.read_bytes() for path in sorted(Path("data").rglob("*.*"))}


def refused(message, kind=UserError):
    return pytest.raises(kind, match=f"^{message}")


# Settings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--dataset=mine", "there is no data/mine/input.txt: python prepare.py --dataset=mine --input=FILE"),
        ("--dataset=nano", 'data/nano has tokens but no meta.json, which must say what they mean: {"tokenizer":'),
        ("--dataset=mine --input=nowhere.txt", "--input: there is no file, or folder with .txt files, nowhere.txt"),
        ("--dataset=mine --input=config", "--input: there is no file, or folder with .txt files, config"),
        ("--dataset=mine --input=pipe", "--input: there is no file, or folder with .txt files, pipe"),
        ("--dataset=../up", "dataset must be a plain folder name"),
        ("--dataset=..", "dataset must be a plain folder name"),
        ("--input=my.txt", "a text of your own needs a name, --dataset=NAME: shakespeare_char is Tiny Shakespeare"),
        ("--url=http://127.0.0.1:9", "a text of your own needs a name, --dataset=NAME"),
        ("--val_fraction=0", "--val_fraction must be a number, above 0 and below 1, found '0'"),
        ("--tokenizer=morse", "there is no tokenizer morse: take char, bpe, gpt2, a tokenizer.json, its folder or"),
        ("--vocab_size=300", "vocab_size needs --tokenizer=bpe, found char"),
        ("--tokenizer=bpe --vocab_size=255", "--vocab_size must be a whole number or None, at least 256 and at"),
        ("--input=a --url=b", "give --input or --url, not both"),
        ("--dataset=fineweb --input=mine.txt", "fineweb is ready made: only --shards can be chosen"),
        ("--dataset=fineweb --shards=104", "--shards must be a whole number or None, at least 1 and at most 103"),
        ("--dataset=mine --shards=2", "shards needs --dataset=fineweb, found mine"),
    ],
)
def test_mistakes_in_the_command(folder, argv, message):
    os.mkfifo("pipe")
    Path("data/nano").mkdir(parents=True)
    Path("data/nano/train.bin").write_bytes(bytes(100))
    with refused(re.escape(message), ConfigError):
        prepare.main(argv.split())
    assert [*files()] == ["train.bin"]


# A text becomes a dataset


@pytest.mark.parametrize(("piece", "share"), [(1, 0.9), (7, 0.75), (2**20, 0.9)])
def test_the_beginning_of_a_text_is_train_and_an_id_is_a_characters_place_among_all(folder, monkeypatch, piece, share):
    monkeypatch.setattr(prepare, "PIECE", piece)
    made(TEXT, *([] if share == 0.9 else [f"--val_fraction={1 - share}"]))
    chars, n_train = "".join(sorted(set(TEXT))), int(len(TEXT) * share)
    ids = [chars.index(char).to_bytes(2, "little") for char in TEXT]
    found = files()
    assert json.loads(found.pop("meta.json")) == {
        "tokenizer": "char",
        "vocab_size": len(chars),
        "chars": chars,
        "train_tokens": n_train,
        "val_tokens": len(TEXT) - n_train,
        "val_bytes": len(TEXT[n_train:].encode()),
        "source": "my.txt",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        "val_fraction": round(1 - share, 2),
    }
    train, val = b"".join(ids[:n_train]), b"".join(ids[n_train:])
    assert found == {"input.txt": TEXT.encode(), "train.bin": train, "val.bin": val}
    assert decoded() == TEXT


any_text = st.text(min_size=2) | st.text(" \n\tab\u0301.'s\u3000❤😀\r0", min_size=2)
any_text = any_text.filter(lambda text: text[0] != "\ufeff")  # a byte-order mark


@pytest.mark.parametrize("argv", [["--tokenizer=char"], ["--tokenizer=bpe", "--vocab_size=260"]])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_any_unicode_text_comes_back(folder, argv, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE", 3)
        meta, ids = made(text, *argv)
    assert decoded() == text
    assert "".join(decoded_stream(tokenizer_of(meta), ids.tolist())) == text
    n_train = int(0.9 * len(text))
    train_ids, val_ids = np.split(ids, [meta["train_tokens"]])
    assert tokenizer_of(meta).decode(train_ids) == text[:n_train]  # the text is split, not the tokens
    assert tokenizer_of(meta).decode(val_ids) == text[n_train:]
    assert meta["val_bytes"] == len(text[n_train:].encode())


@pytest.mark.skipif(not SHAKESPEARE, reason="needs the real text")
def test_tiny_shakespeare_has_the_known_figures(folder):
    prepare.main(["--dataset=shakespeare_char", f"--input={SHAKESPEARE}"])
    meta = load_meta("shakespeare_char")
    assert (meta["vocab_size"], meta["train_tokens"], meta["val_tokens"]) == (65, 1_003_854, 111_540)
    assert meta["sha256"] == prepare.SHAKESPEARE_SHA256
    assert decoded("shakespeare_char") == SHAKESPEARE.read_text()


def peak(work):
    """The most bytes that Python and NumPy hold at any moment of it."""
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def parts_of(most):
    """prepare.PARTS with shorter parts; a piece's last may end within a word."""
    return re.compile(rf"(?s).{{1,{most}}}\Z|.{{1,{most}}}{prepare.WORD_END}|.{{1,{most}}}")


def test_memory_does_not_grow_with_the_text(folder, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 5000)
    monkeypatch.setattr(prepare, "PARTS", parts_of(100))
    words = "the cat sat on the mat and " * 1000
    made(words, "--tokenizer=bpe", "--vocab_size=260")
    bpe = prepare.PrepareConfig(dataset="other", input="my.txt", tokenizer="data/mine/meta.json")
    char = prepare.PrepareConfig(dataset="other", input="my.txt")

    def peaks(n):
        Path("my.txt").write_text(words * n)
        learn = lambda: prepare.learned_bpe(prepare.Text(Path("my.txt"), "me"), 260)  # noqa: E731
        return [peak(work) for work in (learn, lambda: prepare.prepare(char), lambda: prepare.prepare(bpe))]

    peaks(1)  # imports
    assert all(more < less + 100_000 for less, more in zip(peaks(2), peaks(10), strict=True))  # of 216,000 characters


def test_more_characters_than_uint16_can_hold_are_refused(folder):
    text = "".join(chr(0x10000 + i) for i in range(2**16 + 1))
    with refused("65,537 different tokens: uint16 can tell 65,536 apart$"):
        made(text)
    made(text[1:])
    assert decoded() == text[1:]


@pytest.mark.parametrize("piece", [7, 2**20])
def test_characters_that_a_vocabulary_lacks_are_counted_and_can_be_left_out(folder, monkeypatch, capsys, piece):
    monkeypatch.setattr(prepare, "PIECE", piece)
    made("abc d" * 100)
    Path("data/mine/meta.json").rename("known.json")
    text = "a😀b \u0301c" * 300 + "".join(char * n for n, char in enumerate("efghijkl", 1))
    counts = "'\u0301' (300), '😀' (300), 'l' (8), 'k' (7), 'j' (6), 'i' (5), 'h' (4), 'g' (3) and 2 more"
    lacks = f"my.txt has characters that the vocabulary lacks: {counts}"
    with refused(re.escape(f"{lacks}; --drop_unknown leaves them out")):
        made(text, "--tokenizer=known.json")
    capsys.readouterr()
    meta, _ = made(text, "--tokenizer=known.json", "--drop_unknown")
    assert capsys.readouterr().out.startswith(f"{lacks}; left out\n")
    assert decoded() == "ab c" * 300
    assert (meta["train_tokens"], meta["val_tokens"], meta["val_bytes"]) == (1080, 120, 120)


@pytest.mark.parametrize(
    ("text", "argv", "problem"),
    [
        ("", [], "my.txt is too short for --val_fraction=0.1: a split has no token"),
        ("a", [], "my.txt is too short"),
        ("abc" * 1000, ["--val_fraction=0.9999"], "my.txt is too short for --val_fraction=0.9999"),
        (b"\xff", [], "my.txt is not UTF-8 text"),
        ("xyz", ["--tokenizer=none.json"], "there is no tokenizer none.json"),
        ("abcABC" * 9, ["--tokenizer=lower.json"], "my.txt cannot be written in these tokens: decoding them does not"),
    ],
)
def test_a_text_that_cannot_be_prepared_leaves_the_dataset_as_it_was(folder, text, argv, problem):
    library = CharTokenizer("abc").to_library()
    library.normalizer = tokenizers.normalizers.Lowercase()
    library.save("lower.json")
    made("abc" * 100)
    before = files()
    with refused(problem):
        made(text, *argv)
    assert files() == before


def dies_at(moment, work):
    """Whether the process was killed at that write to disk, of which `os.fsync` and `os.replace` come in turn."""
    writes, dead, unlink = itertools.count(), [], Path.unlink

    def dying(write):
        def step(*arguments):
            if next(writes) == moment:
                dead.append(True)
                raise SystemExit
            return write(*arguments)

        return step

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(prepare.os, "fsync", dying(os.fsync))
        patch.setattr(prepare.os, "replace", dying(os.replace))
        patch.setattr(prepare.Path, "unlink", lambda *path, **_: dead or unlink(*path, **_))  # nobody tidies up then
        work()
    return bool(dead)


@pytest.mark.parametrize("moment", range(11))
def test_a_kill_never_leaves_tokens_of_one_text_beside_another(folder, moment):
    made("abc" * 100)
    died = dies_at(moment, lambda: made("cba" * 200))
    assert died == (moment < 10)
    text = Path("data/mine/input.txt").read_text()
    assert text == ("abc" * 100 if moment < 4 else "cba" * 200)
    assert Path("data/mine/meta.json").exists() == (moment < 4 or not died)
    if died and moment >= 4:
        prepare.main(["--dataset=mine"])
    assert decoded() == text


def test_a_text_in_the_place_of_shakespeare_is_told_with_where_it_came_from(folder, capsys):
    Path("my.txt").write_text("abc" * 100)
    for argv in (["--dataset=shakespeare_char", "--input=my.txt"], []):
        prepare.main(argv)
        assert capsys.readouterr().out == (
            "data/shakespeare_char, from my.txt: 3 different characters, 270 train tokens, 30 validation tokens\n"
        )
    prepare.main(["--dataset=shakespeare_char", "--input=data/shakespeare_char/input.txt"])
    assert decoded("shakespeare_char") == "abc" * 100


# The text


@pytest.mark.parametrize("piece", [3, 2**20])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("Grüße".encode() + b"\xff and more", "byte 7 is 0xff"),
        ("Grüße ❤".encode()[:-1], "byte 8 is 0xe2"),
        ("To be or not to be. ".encode("utf-16") * 100, "byte 0 is 0xff"),
        ("To be or not to be. ".encode("utf-16-le") * 100, "2,000 of its 4,000 characters are NUL"),
    ],
)
def test_what_is_no_utf8_is_refused_with_the_program_that_converts_it(folder, monkeypatch, piece, content, found):
    monkeypatch.setattr(prepare, "PIECE", piece)
    Path("my text.txt").write_bytes(content)
    with refused(f"my text.txt is not UTF-8 text: {found}; convert .*: iconv -f .* 'my text.txt' > utf8.txt$"):
        prepare.main(["--dataset=mine", "--input=my text.txt"])


def test_a_few_nul_characters_and_marks_within_a_text_are_text(folder):
    made(b"\xef\xbb\xbfto be\0" + "or not to be. \0\ufeff".encode() * 90)
    assert decoded() == "to be\0" + "or not to be. \0\ufeff" * 90  # but for the byte-order mark at its beginning


def test_a_folder_is_its_texts_in_the_order_of_their_names(folder):
    Path("texts").mkdir()
    for name, text in (("b.txt", "second " * 300), ("a.txt", "\ufefffirst " * 300), ("c.md", "no"), ("._a.txt", "no")):
        Path("texts", name).write_text(text, encoding="utf-8")
    prepare.main(["--dataset=mine", "--input=texts"])
    assert decoded() == "first " + "\ufefffirst " * 299 + "\n" + "second " * 300
    assert files()["input.txt"].decode() == decoded()
    assert load_meta("mine")["source"] == "texts"
    Path("texts", "b.txt").write_bytes(b"\xff")
    with refused("texts/b.txt is not UTF-8 text: byte 0 "):
        prepare.main(["--dataset=mine", "--input=texts"])


THEIRS = ["theirs", "theirs/tokenizer.json", "data/other/meta.json", "run/best.pt"]


@pytest.mark.parametrize(
    ("source", "end"), [("gpt2", "<|endoftext|>"), *((name, "</s>") for name in THEIRS), ("theirs", None)]
)
def test_between_the_texts_of_a_folder_is_the_tokenizers_end_token(folder, monkeypatch, source, end):
    """A newline where it has none."""
    Path("learn.txt").write_text("one two three " * 500)
    library = prepare.learned_bpe(prepare.Text(Path("learn.txt"), "me"), 280).library
    library.add_special_tokens([token for token in ("<pad>", end) if token])
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", lambda name: library)
    monkeypatch.setattr(prepare, "quiet_hub", lambda needed: None)
    for name in ("theirs", "run", "texts"):
        Path(name).mkdir()
    library.save("theirs/tokenizer.json")
    Path("theirs/tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    prepare.main(["--dataset=other", "--input=learn.txt", "--tokenizer=theirs"])
    meta = load_meta("other")
    torch.save({"tokenizer": {fact: meta[fact] for fact in prepare.TOKENIZER_FACTS if fact in meta}}, "run/best.pt")
    for name in "abc":
        Path("texts", f"{name}.txt").write_text("one two three " * 100)
    prepare.main(["--dataset=mine", "--input=texts", f"--tokenizer={source}"])
    meta, ids = load_all("mine")
    assert (ids == library.token_to_id(end or "\u010a")).sum() == 2  # a newline, in the alphabet of bytes
    assert meta.get("end") == end


def test_the_standard_library_is_a_text_without_network(folder, monkeypatch):
    """Its files in the order of their names, but for tests, other packages and those that are not ASCII."""
    sources = {"b.py": "b = 1\n" * 9, "a/c.py": "c = 2\n", "test/t.py": "t", "a/tests/t.py": "t", "u.py": "ü"}
    sources |= {"d.txt": "d", "site-packages/p.py": "p"}
    for name, text in sources.items():
        Path("lib", name).parent.mkdir(parents=True, exist_ok=True)
        Path("lib", name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: {"stdlib": "lib"}[name])
    prepare.main(["--dataset=stdlib_char"])
    assert decoded("stdlib_char") == "c = 2\n" + "b = 1\n" * 9
    assert load_meta("stdlib_char")["source"] == f"the standard library of Python {sys.version.split()[0]}"


# Downloads


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited between attempts."""
    seconds = []
    monkeypatch.setattr(prepare.time, "sleep", lambda pause: seconds.append(pause) if pause else None)
    return seconds


BODY = TEXT.encode()
HALF = 200, {"Content-Length": str(len(BODY))}, BODY[: len(BODY) // 2]
GONE, BUSY, FAILED, AWAY = ((status, {}, b"") for status in (404, 429, 500, 503))


@pytest.mark.parametrize(
    ("answers", "pauses"),
    [
        ([ok(BODY)], []),
        ([(302, {"Location": "/elsewhere", "Content-Length": "0"}, b""), ok(BODY)], []),
        ([(200, {"Content-Length": str(len(BODY))}, BODY + b"and more")], []),
        ([BUSY, FAILED, AWAY, ok(BODY)], [1, 2, 4]),
        ([HALF, ok(BODY)], [1]),
    ],
)
def test_a_text_is_downloaded_with_growing_pauses_where_it_fails(folder, server, waits, answers, pauses):
    server.answers = answers
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert decoded() == TEXT
    assert load_meta("mine")["source"] == server.url
    assert waits == pauses


@pytest.mark.parametrize(
    ("answer", "problem", "attempts"),
    [
        (GONE, "the server answered 404 Not Found", 1),
        (AWAY, "the server answered 503 Service Unavailable", 4),
        (HALF, "the connection failed (Chunked", 4),
        (ok(b"another text"), "wrong content, 12 bytes of sha256 ", 1),
    ],
)
def test_a_failed_download_says_why_and_what_to_do_and_leaves_nothing(
    folder, server, waits, monkeypatch, capsys, answer, problem, attempts
):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", server.url)
    server.answers = [answer]
    advice = "; put the text at data/shakespeare_char/input.txt, or train .*: python train.py config/stdlib_char.py$"
    with refused(f"cannot download {server.url}: {re.escape(problem)}.*{advice}"):
        prepare.main([])
    assert capsys.readouterr().out == f"downloading {server.url}\n"
    assert server.requests == attempts
    assert not files()


def test_a_server_that_falls_silent_is_tried_again(folder, server, waits, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(prepare, "TIMEOUT", (1, 0.2))

    def do_get(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "400")
        handler.end_headers()
        handler.wfile.write(b"a" * 200)
        released.wait(10)

    server.RequestHandlerClass.do_GET = do_get
    with refused(r"cannot download .*: the connection failed \(ConnectionError\)"):
        prepare.main(["--dataset=mine", f"--url={server.url}"])
    released.set()
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("url", ["nonsense", "http://[x", "http://a..b/", "ftp://127.0.0.1/text", "http://127.0.0.1:9"])
def test_an_address_where_nobody_is_or_can_be_is_named(folder, waits, url):
    with refused(re.escape(f"cannot download {url}: ")):
        prepare.main(["--dataset=mine", f"--url={url}"])
    assert waits == ([1, 2, 4] if url.endswith("9") else [])


def test_tiny_shakespeare_is_downloaded_once_and_its_hash_checked(folder, server, monkeypatch):
    server.answers = [ok(BODY)]
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(BODY).hexdigest())
    prepare.main([])
    prepare.main([])
    assert server.requests == 1
    assert decoded("shakespeare_char") == TEXT


def test_long_work_shows_megabytes(folder, server, capsys, monkeypatch):
    server.answers = [ok(b"text" * 300_000)]
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    assert capsys.readouterr().err == ""  # it was short
    monkeypatch.setattr(prepare, "LONG", 1000)
    monkeypatch.setattr(prepare.time, "monotonic", itertools.count(0, 10).__next__)  # seconds between any two looks
    monkeypatch.setattr(prepare.progress, "shown", -math.inf)
    prepare.main(["--dataset=mine", f"--url={server.url}"])
    lines = capsys.readouterr().err.splitlines()
    assert {"downloading data/mine/input.txt: 1 of 1 MB", "reading data/mine/input.txt: 1 of 1 MB"} <= {*lines}


# The tokens


def test_a_character_is_a_token_and_one_outside_the_vocabulary_is_named_with_its_position():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.encode("cab").tolist() == [2, 0, 1]
    assert tokenizer.encode("cab").dtype == np.uint16
    assert tokenizer.decode(np.array([2, 0, 1])) == "cab"
    with pytest.raises(ValueError, match="character 'é' at position 3 is not in the vocabulary"):
        tokenizer.encode("abcéd")


def test_bpe_learns_frequent_pairs_of_the_text(folder):
    meta, ids = made("the cat the hat the mat. " * 100, "--tokenizer=bpe", "--vocab_size=262")
    tokenizer = tokenizer_of(meta)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("bpe", 262)
    assert {tokenizer.decode(np.array([id])) for id in range(256, 262)} >= {"at", " the"}
    assert ids.max() < 262
    assert len(ids) < 0.6 * 2500


def test_a_token_of_a_text_without_blanks_is_no_whole_passage(folder):
    meta, _ = made("春眠不覺曉處處聞啼鳥" * 500, "--tokenizer=bpe", "--vocab_size=400")
    assert meta["train_tokens"] > 400
    assert decoded() == "春眠不覺曉處處聞啼鳥" * 500


def test_a_bpe_is_learned_from_pieces_of_a_long_text(folder, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 1000)
    monkeypatch.setattr(prepare, "LEARN_FROM", 4000)
    read, islice = [], itertools.islice
    monkeypatch.setattr(prepare.itertools, "islice", lambda *a: (read.append(piece) or piece for piece in islice(*a)))
    made("the cat the hat the mat. " * 1000, "--tokenizer=bpe", "--vocab_size=262")
    assert 2000 <= sum(map(len, read)) <= 6000


RANDOM = "".join(np.random.default_rng(0).choice(list("abc d\n\n  .,'s09éß ❤"), size=20_000))


@pytest.mark.parametrize(
    ("text", "parts", "kind", "settings"),
    [
        (f"{RANDOM}<|endoftext|>{RANDOM}", parts_of(700), "ByteLevel", {"add_prefix_space": False}),
        ("the cat sat\n on the mat. " * 2000, prepare.PARTS, "Metaspace", {}),  # whose mark at the beginning is lost
    ],
)
def test_pieces_and_threads_do_not_change_the_tokens(folder, monkeypatch, text, parts, kind, settings):
    """Those of a tokenizer.json of elsewhere, of the whole text at once."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = getattr(tokenizers.pre_tokenizers, kind)(**settings)
    library.decoder = getattr(tokenizers.decoders, kind)()
    library.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False))
    library.add_special_tokens(["<|endoftext|>"])
    library.save("their.json")
    monkeypatch.setattr(prepare, "PIECE", 5000)
    monkeypatch.setattr(prepare, "PARTS", parts)
    meta, ids = made(text, "--tokenizer=their.json")
    n_train = int(0.9 * len(text))
    assert ids.tolist() == library.encode(text[:n_train]).ids + library.encode(text[n_train:]).ids
    assert meta["vocab_size"] == library.get_vocab_size()
    tokenizer = tokenizer_of(meta)
    assert "".join(decoded_stream(tokenizer, ids[:200].tolist())) == tokenizer.decode(ids[:200])


def test_gpt2s_tokens_come_from_the_hub_and_by_the_name_of_the_dataset(folder, monkeypatch):
    meta, ids = made("the cat the hat the mat. " * 100, "--tokenizer=bpe")
    library, asked = tokenizer_of(meta).library, []
    monkeypatch.setattr(prepare, "quiet_hub", lambda needed: None)
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", lambda name: asked.append(name) or library)
    prepare.main(["--dataset=mine_gpt2", "--input=my.txt"])
    assert asked == ["gpt2"]
    assert load_meta("mine_gpt2")["tokenizer"] == "gpt2"
    assert load_all("mine_gpt2")[1].tolist() == ids.tolist()
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", lambda name: 1 / 0)
    with refused(r"cannot get GPT-2's tokenizer .* \(ZeroDivisionError: .*\); .*--tokenizer=FILE"):
        prepare.main(["--dataset=mine_gpt2", "--input=my.txt"])


@pytest.mark.parametrize("source", ["out", "out/best.pt", "hf", "hf/tokenizer.json", "known.json"])
def test_the_tokens_of_another_model_prepare_a_text_to_train_it_further(folder, source):
    meta, _ = made("abc d" * 100)
    Path("data/mine/meta.json").rename("known.json")
    for name in ("out", "hf"):
        Path(name).mkdir()
    torch.save({"tokenizer": CharTokenizer("xyz").facts}, "out/ckpt.pt")
    torch.save({"tokenizer": CharTokenizer(meta["chars"]).facts}, "out/best.pt")  # which is preferred
    tokenizer_of(meta).to_library().save("hf/tokenizer.json")
    made("dad" * 100, f"--tokenizer={source}")
    assert decoded() == "dad" * 100
    assert load_all("mine")[1].max() == meta["chars"].index("d")


def test_a_text_is_prepared_without_torch(folder):
    made("abc" * 100)
    lines = "import sys, prepare; prepare.main(['--dataset=mine']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)


class Hostile:
    def __reduce__(self):
        return (open, ("code_was_run", "w"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", r"Exception: "),
        ("not JSON", r"JSONDecodeError: Expecting value"),
        ("5", r"TypeError: "),
        ('{"tokenizer": "char", "vocab_size": 3, "chars": "ab"}', "ValueError: chars must be as many different"),
        ("no checkpoint", "RuntimeError: "),
        ({"model": 1}, "KeyError: "),
        ({"tokenizer": Hostile()}, "UnpicklingError: it holds more than tensors"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named_and_runs_no_code(folder, content, problem):
    name = "their.json" if isinstance(content, str) and content != "no checkpoint" else "ckpt.pt"
    Path(name).write_text(content) if isinstance(content, str) else torch.save(content, name)
    with refused(rf"--tokenizer={name} is not usable \({problem}", ConfigError):
        made("abc", f"--tokenizer={name}")
    assert not Path("code_was_run").exists()


PADDING = {"strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 70_000,
           "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


def test_of_a_tokenizer_json_padding_and_truncation_are_of_no_concern_and_a_panic_is_one_line(folder):
    facts = json.loads(CharTokenizer("abc").to_library().to_str())
    Path("their.json").write_text(json.dumps(facts | {"truncation": TRUNCATION, "padding": PADDING}))
    made("abcabc" * 10, "--tokenizer=their.json")
    assert decoded() == "abcabc" * 10
    Path("their.json").write_text(json.dumps(facts | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}))
    with refused(r"the tokenizer cannot encode this text \(PanicException: "):
        made("abc", "--tokenizer=their.json")


def test_a_stream_shows_characters_once_they_are_whole(folder):
    tokenizer = tokenizer_of(made("ab ❤ ab ❤ 😀 " * 100, "--tokenizer=bpe", "--vocab_size=256")[0])  # bytes
    assert list(decoded_stream(tokenizer, tokenizer.encode("a❤😀b").tolist())) == ["a", "❤", "😀", "b"]
    torn = [*tokenizer.encode("❤").tolist()[1:], *tokenizer.encode("a❤").tolist()[:-1]]
    assert "".join(decoded_stream(tokenizer, torn)) == tokenizer.decode(np.array(torn))


# Reading back


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("train.bin", lambda data: data[:-1], "ValueError: Size of available data is not a mult"),
        ("train.bin", lambda data: data + data, "ValueError: it holds 36000 tokens, meta.json promises 18000"),
        ("val.bin", lambda data: data[:-2], "ValueError: it holds 1999 tokens, meta.json promises 2000"),
        ("meta.json", lambda data: data[:9], "JSONDecodeError"),
        ("meta.json", lambda data: b"[]", "TypeError"),
        ("meta.json", lambda data: b"{}", "KeyError: 'tokenizer'"),
        ("meta.json", lambda data: data.replace(b'"chars": "', b'"chars": "?'), "ValueError: chars"),
        ("meta.json", lambda data: data.replace(b'"chars": " ', b'"chars": "a'), "ValueError: chars"),  # twice
        ("meta.json", lambda data: data.replace(b'"chars": " ', b'"chars": "\\ud800'), "UnicodeEncodeError"),
        ("meta.json", lambda data: b'{"tokenizer": "gpt2"}', "KeyError: 'vocab_size'"),
        ("meta.json", lambda data: b'{"tokenizer": "x", "vocab_size": 65537}', "ValueError: vocab"),
        ("meta.json", lambda data: b'{"tokenizer": "x", "vocab_size": 0}', "ValueError: vocab"),
        ("meta.json", lambda data: data.replace(b'"val_bytes": 2', b'"val_bytes": -2'), "ValueError: vocab"),
    ],
)
def test_damaged_datasets_are_refused_with_the_files_name(dataset, name, damage, problem):
    path = dataset / name
    path.write_bytes(damage(path.read_bytes()))
    with refused(rf"data/shakespeare_char/{name} is damaged \({re.escape(problem)}"):
        load_all("shakespeare_char")


def test_a_block_is_read_with_its_targets_and_no_id_is_outside_the_vocabulary(folder):
    meta, ids = made("abcd" * 25)
    tokens = Tokens("mine", "val", meta, 9)
    assert tokens.blocks(np.array([0, 1]), 8).tolist() == [ids[90:99].tolist(), ids[91:100].tolist()]
    with refused("data/mine/val.bin has 10 tokens, too few for block_size 10 and a target: lower --block_size or"):
        Tokens("mine", "val", meta, 10)
    with pytest.raises(OSError, match=r"^data/mine/val.bin has token id 3; the vocabulary has 3 tokens$"):
        Tokens("mine", "val", meta | {"vocab_size": 3}, 9).blocks(np.array([0]), 8)


def test_a_split_is_told_by_its_length_and_its_ends(folder):
    """Of which a million tokens each are looked at."""
    Path("data/mine").mkdir(parents=True)

    def fingerprint(n, place):
        np.where(np.arange(n) == place, 1, 0).astype("<u2").tofile("data/mine/train.bin")
        return Tokens("mine", "train", {"vocab_size": 2}, 8).fingerprint()

    texts = (1_500_000, None), (1_500_000, 0), (1_500_000, 999_999), (1_500_000, 1_499_999), (1_500_001, None)
    assert len({fingerprint(*text) for text in texts}) == len(texts)


# FineWeb


def fineweb(n_shards):
    prepare.main(["--dataset=fineweb", f"--shards={n_shards}"])


def check_fineweb(n_shards):
    """The dataset is that of so many shards."""
    meta = load_meta("fineweb")
    train, val = (Tokens("fineweb", split, meta, 8).ids for split in ("train", "val"))
    assert np.array_equal(train, np.concatenate([SHARD_TOKENS[number] for number in range(1, n_shards + 1)]))
    assert np.array_equal(val, SHARD_TOKENS[0])
    assert (meta["tokenizer"], meta["vocab_size"], meta["shards"]) == ("gpt2", 50257, n_shards)


@pytest.fixture
def two_shards(hub):
    """The dataset of two of FineWeb's shards; what is `asked` of the hub counts from here."""
    fineweb(2)
    hub.asked.clear()
    return hub


def test_fineweb_is_its_shards_one_after_another(hub, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "SHARDS", 3)
    prepare.main(["--dataset=fineweb"])
    check_fineweb(3)
    assert hub.asked == [0, 1, 2, 3]
    assert [*files()] == ["meta.json", "shards.json", "train.bin", "val.bin"]
    first, *downloads, last = capsys.readouterr().out.splitlines()
    assert first == "data/fineweb: 3 of FineWeb's 3 shards, 0.8 GB to download"
    assert [line.rpartition("_")[2] for line in downloads] == [f"00000{number}.bin" for number in range(4)]
    source = "huggingface.co/datasets/kjj0/fineweb10B-gpt2"
    assert last == f"data/fineweb, from {source}: 50,257 different tokens, 1,506 train tokens, 500 validation tokens"
    monkeypatch.setenv("HF_ENDPOINT", "")  # which is none
    assert prepare.hub() == "https://huggingface.co"


def test_an_interrupted_download_of_fineweb_resumes_after_the_last_whole_shard(hub, waits, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 100)
    hub.bodies[3], hub.broken = b"", (1, 2)  # each other shard breaks off twice
    with refused(".*000003.bin: the server answered 500 .*; the same command tries again, from this shard on$"):
        fineweb(4)
    assert waits == [1, 2] * 3 + [1, 2, 4]
    assert not Path("data/fineweb/meta.json").exists()
    hub.bodies[3] = shard(SHARD_TOKENS[3])
    hub.asked.clear()
    fineweb(4)
    check_fineweb(4)
    assert set(hub.asked) == {3, 4}


@pytest.mark.parametrize("moment", range(15))
def test_a_kill_while_fineweb_grows_leaves_the_smaller_dataset_whole(hub, moment):
    fineweb(1)
    inode = Path("data/fineweb/train.bin").stat().st_ino
    died = dies_at(moment, lambda: fineweb(3))
    assert died == (moment < 14)
    check_fineweb(1 if died else 3)
    hub.asked.clear()
    fineweb(3)
    check_fineweb(3)
    assert len(hub.asked) <= 2
    assert 1 not in hub.asked
    assert Path("data/fineweb/train.bin").stat().st_ino == inode  # no second copy


def test_fewer_shards_need_no_download_and_more_only_what_is_missing(two_shards):
    for n_shards, asked in ((1, []), (2, []), (3, [3])):
        with open("data/fineweb/train.bin", "ab") as file:
            file.write(b"what a killed download has left of a shard.")
        fineweb(n_shards)
        check_fineweb(n_shards)
        assert two_shards.asked == asked
    with open("data/fineweb/val.bin", "ab") as file:
        file.write(b"more")
    with refused(r"data/fineweb/val.bin is damaged \(ValueError: it holds 502 tokens, meta.json promises 500\)"):
        check_fineweb(3)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (shard(SHARD_TOKENS[3], magic=20240801), "its header says 20240801, 1, 503; expected (20240520, 1, 503.0)"),
        (shard(SHARD_TOKENS[3], version=2), "its header says 20240520, 2, 503; expected (20240520, 1, 503.0)"),
        (shard(SHARD_TOKENS[3], n_tokens=502), "its header says 20240520, 1, 502; expected (20240520, 1, 503.0)"),
        (shard(SHARD_TOKENS[3])[:-1], "its header says 20240520, 1, 503; expected (20240520, 1, 502.5)"),
        (shard(SHARD_TOKENS[3])[:1023], ""),
        (shard(np.array([1, 50257], "<u2")), "it has token id 50257"),
    ],
)
def test_a_damaged_shard_is_refused_and_never_trained_on(two_shards, body, problem):
    two_shards.bodies[3] = body
    with refused(rf"http://127.*/fineweb_train_000003.bin is damaged \(ValueError: {re.escape(problem)}"):
        fineweb(3)
    assert [*files()] == ["meta.json", "shards.json", "train.bin", "val.bin"]
    check_fineweb(2)


@pytest.mark.parametrize(("name", "asked"), [("val.bin", [0]), ("train.bin", [1, 2])])
def test_a_damaged_split_of_fineweb_that_is_removed_is_downloaded_again(two_shards, name, asked):
    path = Path("data/fineweb", name)
    os.truncate(path, 401)
    with refused(f"{path} is damaged .*; remove it, and prepare.py makes it anew$"):
        check_fineweb(2)
    if name == "train.bin":
        with refused(f"data/fineweb/shards.json is damaged .* is shorter than its shards.*; remove it and {path}$"):
            fineweb(3)
    path.unlink()
    fineweb(2)
    check_fineweb(2)
    assert two_shards.asked == asked


@pytest.mark.parametrize("content", ["[5", "{}", "[-5]", "[1.5]", "[0, 0]", "[true]"])
def test_a_damaged_record_of_shards_is_named(two_shards, content):
    before = files()
    Path("data/fineweb/shards.json").write_text(content)
    with refused(r"data/fineweb/shards.json is damaged \(\w+Error: .*; remove it and "):
        fineweb(2)
    assert files() == before | {"shards.json": content.encode()}


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_tokens_of_another_origin_are_not_overwritten_by_fineweb(hub, name):
    Path("data/fineweb").mkdir(parents=True)
    Path("data/fineweb", name).write_bytes(b"mine")
    with refused("data/fineweb has tokens but no shards.json, .* move .*train.bin and .*val"):
        fineweb(1)
    assert files() == {name: b"mine"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the system")
def test_a_disk_that_fills_while_fineweb_grows_costs_nothing(two_shards):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # bytes of the largest file
    try:
        with pytest.raises(OSError, match=r"File too large"):
            fineweb(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_fineweb(2)
    fineweb(4)
    check_fineweb(4)


def test_a_large_shard_takes_little_memory(hub, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 2**12)
    fineweb(1)  # imports
    hub.bodies[2] = shard(np.tile(np.arange(50_000, dtype="<u2"), 50))  # 5 MB
    assert peak(lambda: fineweb(2)) < 1_000_000


# Files


def test_a_file_is_on_disk_before_it_takes_its_name(folder, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(prepare.os, "fsync", lambda fd: order.append((Path("file.tmp").read_bytes(), fsync(fd))))
    monkeypatch.setattr(prepare.os, "replace", lambda *paths: order.append(replace(*paths)))
    with prepare.replacing(Path("file")) as file:
        file.write(b"new")
    assert order == [(b"new", None), None]
    assert Path("file").read_bytes() == b"new"


def test_a_failed_write_names_the_file_and_leaves_the_old_one_and_nothing_beside_it(folder):
    Path("file").write_text("old")
    with pytest.raises(OSError, match=r"device: 'file'$"), prepare.replacing(Path("file")) as file:  # noqa: PT012
        file.write(b"new")
        raise OSError(28, "No space left on device")
    assert Path("file").read_text() == "old"
    assert not Path("file.tmp").exists()


def test_a_folder_is_one_runs_until_it_ends(folder):
    lock = Path("out/lock")
    with (
        prepare.locked(lock),
        refused("out is in use by another run: .* take another --out_dir$"),
        prepare.locked(lock),
    ):
        pass
    with prepare.locked(lock):
        pass
