"""What sample.py promises: a checkpoint and a prompt in, text out.

The text is what model.generate says with the given choice and seed, each of several samples as one of a batch, and
appears as it is made. The prompt is typed, with \\n for a line break, or read from a file. best.pt is preferred, and
what is read is told on stderr. A mistake is one line. Weights of other programs, the token that ends a text, and
exports are tested in test_interchange.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, checkpoint, train_here

import prepare
import sample
from config import ConfigError, UserError
from model import GPT
from prepare import CharTokenizer


@pytest.fixture
def out(trained):
    """A folder with out/best.pt and out/ckpt.pt, and no data any more; the current one."""
    for path in (trained / "data" / "shakespeare_char").iterdir():
        path.unlink()
    return trained


def say(capsys, *arguments):
    capsys.readouterr()
    sample.main(["--max_new_tokens=40", *arguments])
    return capsys.readouterr().out


# The text


@pytest.mark.parametrize(
    ("n", "choice"),
    [
        (1, {}),
        (3, {"temperature": 0.9, "top_k": 5, "top_p": 0.95, "seed": 7}),
        (1, {"top_p": 0.3}),
        (1, {"top_k": 2}),
        (1, {"temperature": 0.3}),
        (1, {"temperature": 0}),
    ],
)
def test_the_text_is_what_generate_says(out, capsys, n, choice):
    model, tokenizer = sample.load("out")
    idx = torch.tensor([tokenizer.encode("the king").tolist()] * n)
    given = {"temperature": 0.8} | choice
    chance = torch.Generator().manual_seed(given.pop("seed", 1337))
    rows = model.generate(idx, 40, **given, generator=chance)
    expected = [tokenizer.decode(row.numpy()) for row in rows]
    assert len(set(expected)) == n
    keys = [f"--{name}={value}" for name, value in choice.items()]
    text = say(capsys, "--start=the king", f"--num_samples={n}", *keys)
    assert text == "\n---------------\n".join(expected) + "\n"
    assert len(expected[0]) == len("the king") + 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_samples_and_the_same_seed_gives_the_same_text(out, capsys, monkeypatch, dtype):
    used, hidden = set(), GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *inputs: used.add(str((x := hidden(*inputs)).dtype)) or x)
    texts = [say(capsys, "--start=the king", f"--dtype={dtype}", f"--seed={seed}") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert used == {f"torch.{dtype}"}


def test_one_sample_appears_as_it_is_made_and_several_are_one_batch(out, monkeypatch):
    shown, batches, hidden = [], [], GPT.hidden

    def put(text="", file=None, flush=False, **_):
        if file is None:
            shown.append((text, flush))

    monkeypatch.setattr("builtins.print", put)
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, *rest: batches.append(len(idx)) or hidden(self, idx, *rest))
    sample.main(["--start=the", "--max_new_tokens=5"])
    assert shown[:3] == [("t", True), ("h", True), ("e", True)]
    assert [(len(text), flush) for text, flush in shown[3:]] == [(1, True)] * 5 + [(0, False)]
    sample.main(["--start=the", "--max_new_tokens=5", "--num_samples=4"])
    assert batches == [1] * 5 + [4] * 5


@pytest.mark.parametrize("model", ["gpt", "bigram"])
def test_samples_go_past_the_context(dataset, capsys, model):
    train_here(model=model, block_size=8, max_iters=1)
    assert len(say(capsys, "--max_new_tokens=100", "--start=a")) == 102


def test_the_readmes_lines_of_python_write(out, capsys):
    [lines] = re.findall(r"^```python\n(from sample .*?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    lines = lines.replace("out/shakespeare_char_cpu", "out").replace("ROMEO:", "the king").replace("200", "40")
    exec(lines)
    assert len(capsys.readouterr().out) == len("the king") + 40 + 1
    model, tokenizer = sample.load("out")
    greedy = [sample.write(model, tokenizer, "the", 10, temperature=0) for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert f"{greedy[0]}\n" == say(capsys, "--start=the", "--max_new_tokens=10", "--temperature=0")


# The prompt


def test_the_prompt_may_come_from_a_file_and_be_longer_than_the_context(out, capsys, monkeypatch):
    words = "the king and queen of this fair land"
    text = say(capsys, f"--start={words}")
    for content in (words, f"\ufeff{words}"):  # as Windows' editors save it
        Path("prompt.txt").write_text(content)
        assert say(capsys, "--start=FILE:prompt.txt") == text
    monkeypatch.setenv("HOME", str(out))
    assert say(capsys, "--start=FILE:~/prompt.txt") == text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"\t \d", r"\t \d"),
        (r"\\alpha", r"\alpha"),
        ("FILE:prompt.txt", "a\\n\n"),  # which has line breaks of its own
        (None, "\n"),  # the default
    ],
)
def test_a_line_break_may_be_typed_as_backslash_n(folder, typed, meant):
    Path("prompt.txt").write_text("a\\n\n")
    tokenizer = CharTokenizer("\t\n \\adhlnpt")  # a line break is not the first of them
    assert tokenizer.decode(sample.prompt(typed, tokenizer)[0].numpy()) == meant


def test_without_a_prompt_a_vocabulary_without_line_breaks_will_do():
    assert sample.prompt(None, CharTokenizer("ab")).tolist() == [[0]]


# What is read


def test_best_is_preferred_and_ckpt_will_do_and_the_one_that_is_read_is_told(out, capsys):
    best = checkpoint("out/best.pt")
    best["model"] = {name: torch.zeros_like(tensor) for name, tensor in best["model"].items()}
    torch.save(best, "out/best.pt")
    found = []
    for name in ("best.pt", "ckpt.pt"):
        sample.main(["--start=a", "--max_new_tokens=20"])
        text, told = capsys.readouterr()
        assert told == f"out/{name}, step 20, on cpu, float32\n"
        found.append(text)
        Path("out/best.pt").unlink(missing_ok=True)
    assert found[0] != found[1]


def test_a_checkpoint_from_a_gpu_samples_on_a_cpu(out, capsys, monkeypatch):
    expected, content = say(capsys, "--start=the"), checkpoint("out/best.pt")
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")  # as if its tensors lay there
    torch.save(content, "out/best.pt")
    assert say(capsys, "--start=the", "--device=cpu") == expected


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        ({"tokenizer": "char", "vocab_size": 2, "chars": "ab"}, "ValueError: 2 tokens for a vocabulary of 21"),
        ({"tokenizer": "char", "vocab_size": 21, "chars": "ab"}, "ValueError: chars must"),
        ({"tokenizer": "char"}, "KeyError: 'chars'"),
        (None, "TypeError: "),
        ({"tokenizer": "morse", "vocab_size": 21}, "tokenizer 'morse' is not supported; there are 'char', 'gpt2' and"),
    ],
)
def test_a_checkpoint_with_a_wrong_tokenizer_is_refused(out, tokenizer, problem):
    torch.save(checkpoint("out/best.pt") | {"tokenizer": tokenizer}, "out/best.pt")
    with pytest.raises(UserError, match=rf"^(out/best.pt has no usable tokenizer \()?{problem}"):
        sample.main([])


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start=king#1"], "--start: character '#' at position 4 is not in the vocabulary"),
        (["--start="], "--start: the model needs at least one token to continue, found an empty text"),
        (["--start=FILE:nowhere"], "--start: [Errno 2] No such file or directory: 'nowhere'"),
        (["--start=FILE:noise"], "--start: noise is not UTF-8 text: byte 0 is 0xff; convert it"),
        (["--start=FILE:~no-such-user/p.txt"], "--start: Could not determine home directory"),
        (["--out_dir=nowhere"], "there is no checkpoint in nowhere; there is one in out"),
        (["--init_from=gtp2"], "there is no checkpoint in gtp2; there is one in out"),
        (["--save_pretrained="], "save_pretrained is empty: it must name a folder"),
        (["--top_k=0"], "--top_k must be a whole number or None, at least 1, found '0'"),
        (["--top_p=0"], "--top_p must be a number or None, above 0 and at most 1, found '0'"),
        (["--temperature=1e-39"], "temperature must be 0 or at least 0.001, found 1e-39"),
        (["--seed=-1"], "--seed must be a whole number, at least 0 and below 9.22337e+18, found '-1'"),
    ],
)
def test_mistakes(out, arguments, message):
    Path("noise").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        sample.main(arguments)


def test_without_any_checkpoint_training_is_named(folder):
    with pytest.raises(ConfigError, match=r"^there is no checkpoint in out; python train\.py makes one$"):
        sample.main([])


# The process


def test_any_character_can_be_printed_and_a_closed_pipe_is_quiet(folder):
    Path("mine.txt").write_text("❤😀" * 3000)
    prepare.main(["--dataset=mine", "--input=mine.txt"])
    train_here(dataset="mine", max_iters=1)
    argv = [sys.executable, str(REPOSITORY / "sample.py"), "--start=❤", "--max_new_tokens=2000"]
    cp1252 = os.environ | {"PYTHONIOENCODING": "cp1252"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cp1252) as running:
        assert running.stdout.read(3).decode() == "❤"
        running.stdout.close()
        assert running.stderr.read() == b"out/best.pt, step 1, on cpu, float32\n"
        assert running.wait(60) == 141
