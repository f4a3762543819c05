"""The three programs one after another, as a user types them: a text, a run, a sample.

Any text of one's own, the README's first training, the recipes; what README's lines of Python say; what the lecture's
steps learn. LADDER=1 trains each of them to its end.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SHAKESPEARE, checkpoint, command, losses, ok, shard, train_here

import prepare
import sample
import train
from config import ConfigError
from model import open_model


def test_own_text_prepare_train_sample(folder):
    """With neither home nor stdin, and beside a module of the user's that is called as one of ours."""
    Path("mine.txt").write_text("Wär ich ein Vöglein, flög ich zu dir. " * 300)
    Path("own").mkdir()
    Path("own/config.py").write_text("raise SystemExit('the wrong one')")
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"PYTHONPATH": "own"}
    small = ["--n_layer=1", "--n_head=4", "--n_embd=64", "--block_size=32", "--batch_size=16", "--dropout=0"]
    steps = ["--max_iters=150", "--eval_interval=150", "--learning_rate=1e-2"]
    for program, *arguments in (
        ("prepare.py", "--dataset=mine", "--input=mine.txt"),
        ("train.py", "--dataset=mine", "--out_dir=out/mine", *small, *steps),
        ("sample.py", "--out_dir=out/mine", "--start=Wär ich", "--temperature=0", "--max_new_tokens=24"),
    ):
        argv = shlex.join([sys.executable, str(REPOSITORY / program), *arguments])
        ended = subprocess.run(f"{argv} <&-", shell=True, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        if program == "train.py":
            assert losses(ended.stdout)[150][1] < 0.5
    assert ended.stdout == "Wär ich ein Vöglein, flög ich z\n"


@pytest.mark.skipif(not SHAKESPEARE, reason="needs the real text")
def test_the_cpu_recipe_downloads_tiny_shakespeare_and_learns(folder, server, monkeypatch, capsys):
    """The first steps of the recipe that most readers run first, with the real text, from a real server."""
    server.answers = [ok(SHAKESPEARE.read_bytes())]
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", server.url)
    train.main(["config/shakespeare_char_cpu.py", "--max_iters=60", "--eval_interval=60", "--eval_iters=3"])
    out = capsys.readouterr().out
    assert out.startswith(
        f"downloading {server.url}\ndata/shakespeare_char, from {server.url}: 65 different characters, 1,003,854 train "
        "tokens, 111,540 validation tokens\n"
    )
    assert losses(out)[0][1] == pytest.approx(np.log(65), abs=0.1)
    assert losses(out)[60][1] < 3


def test_no_network_at_all_trains_on_the_standard_library(folder, monkeypatch, capsys):
    """On a few files of it."""
    library = Path(prepare.sysconfig.get_path("stdlib"))
    Path("few").mkdir()
    for name in ("json", "logging"):
        (Path("few") / name).symlink_to(library / name)
    (Path("few") / "this.py").write_text((library / "argparse.py").read_text())
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: "few")
    train.main(["config/stdlib_char.py", "--max_iters=3", "--eval_interval=3", "--eval_iters=2", "--device=cpu"])
    found = losses(capsys.readouterr().out)
    assert found[3][1] < found[0][1]
    sample.main(["--out_dir=out/stdlib_char", "--start=def ", "--max_new_tokens=20"])
    assert capsys.readouterr().out.startswith("def ")


def test_gpt2_124m_downloads_fineweb_and_trains_without_a_tokenizer(hub, capsys, monkeypatch):
    """The recipe's own settings, but for the size; its 103 shards are small ones."""
    hub.bodies |= {number: shard(np.arange(100, dtype="<u2")) for number in range(1, 104)}
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    sizes = ["--n_layer=1", "--n_embd=8", "--n_head=2", "--block_size=16", "--max_iters=12", "--batch_size=8"]
    sizes += ["--gradient_accumulation_steps=2", "--device=cpu", "--warmup_iters=2", "--learning_rate=0.1"]
    train.main(["config/gpt2_124m.py", *sizes])
    assert hub.asked == [*range(104)]
    found = losses(capsys.readouterr().out)
    assert found[0][1] == pytest.approx(np.log(50257), abs=0.1)
    assert found[12][0] < found[0][0] - 2  # counting to 100 is soon learned; the validation shard is noise
    assert checkpoint("out/gpt2_124m/best.pt")["shards"] == 103
    # A resumed run reads the same shards.
    prepare.main(["--dataset=fineweb", "--shards=102"])
    with pytest.raises(ConfigError, match=r"holds another model or text .*shards 103 -> 102\)"):
        train.main(["config/gpt2_124m.py", *sizes])
    hub.asked.clear()
    prepare.main(["--dataset=fineweb", "--shards=103"])
    train.main(["config/gpt2_124m.py", *sizes, "--max_iters=13"])
    assert hub.asked == []
    with pytest.raises(ModuleNotFoundError, match="tokenizers"):  # what is told as: pip install tokenizers
        sample.main(["--out_dir=out/gpt2_124m", "--device=cpu"])


def test_the_lines_of_the_readme_draw_the_curve_and_attention_and_show_surprise(folder, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    Path("mine.txt").write_text("But, soft! what light through yonder window breaks?\n" * 300)
    prepare.main(["--dataset=shakespeare_char", "--input=mine.txt"])
    train_here(out_dir="out/shakespeare_char_cpu", block_size=64, max_iters=150, learning_rate=1e-2, eval_interval=50)
    capsys.readouterr()
    readme = (REPOSITORY / "README.md").read_text()
    for first in ("pandas", "matplotlib"):
        [lines] = re.findall(rf"^```python\n(import {first}.*?)^```", readme, re.M | re.S)
        exec(lines, {})
    for picture in ("curve.png", "attention.png"):
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    characters, surprise = capsys.readouterr().out.splitlines()
    assert characters == "ut, soft! what light"
    assert len(surprise) == len(characters) and surprise.isdecimal()
    assert surprise.count("0") > len(surprise) / 2  # the text is learned by heart


def test_what_the_readme_calls_the_parts_of_the_lecture_exists():
    table = (REPOSITORY / "README.md").read_text().partition("| the lecture | here |")[2].partition("\n\n")[0]
    names = [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[2])]
    code = "".join((REPOSITORY / file).read_text() for file in ("model.py", "train.py", "prepare.py"))
    assert {"CausalSelfAttention", "LanguageModel.generate", "batch", "CharTokenizer"} <= {*names}
    for name in names:
        assert (REPOSITORY / name).exists() or re.search(rf"^ *(def|class) {name.split('.')[-1]}\b", code, re.M), name


def test_a_checkpoint_from_windows_samples(dataset, capsys):
    train_here(max_iters=1)
    content = checkpoint("out/best.pt")
    content["config"] |= {"out_dir": "C:\\out\\my run", "init_from": "C:\\gpt2"}
    torch.save(content, "out/best.pt")
    sample.main(["--max_new_tokens=5", "--start=the"])
    torch.save(checkpoint() | {"config": content["config"]}, "out/ckpt.pt")
    capsys.readouterr()
    train_here(max_iters=2)
    assert "resuming from out/ckpt.pt at step 1; changed since: max_iters 1 -> 2\n" in capsys.readouterr().out


def bigram_losses(dataset):
    """On the training split: that of the relative frequencies of the pairs, and that of the trained table."""
    ids = torch.from_numpy(np.fromfile(dataset / "train.bin", "<u2").astype(np.int64))
    counts = torch.zeros(65, 65, dtype=torch.float64)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1, dtype=torch.float64), accumulate=True)
    truth = -(counts / counts.sum(1, keepdim=True)).log()[ids[:-1], ids[1:]].mean().item()
    return truth, open_model("out/lecture/1_bigram/ckpt.pt")[0].train()(ids[None, :-1], ids[None, 1:])[1].item()


def test_the_bigram_model_learns_the_counts(dataset):
    """The only model here with an exact answer."""
    train.main(["config/lecture/1_bigram.py", "--block_size=64", "--max_iters=800", "--device=cpu"])
    truth, loss = bigram_losses(dataset)
    assert truth <= loss <= truth + 0.01


LADDER = {"1_bigram": 2.50, "2_self_attention": 2.41, "3_multi_head": 2.29, "4_feed_forward": 2.27, "5_residual": 2.10,
          "6_layer_norm": 2.08}  # fmt: skip


@pytest.mark.skipif("LADDER" not in os.environ or not SHAKESPEARE, reason="three minutes; LADDER=1 runs it")
def test_the_ladder_goes_down_to_its_limits(folder, capsys):
    assert command("prepare.py", "--dataset=shakespeare_char", f"--input={SHAKESPEARE}").returncode == 0
    found = []
    for rung, limit in LADDER.items():
        train.main([f"config/lecture/{rung}.py"])
        found.append(losses(capsys.readouterr().out)[5000][1])
        assert found[-1] <= limit
    assert found == sorted(set(found), reverse=True)
    truth, loss = bigram_losses(folder / "data" / "shakespeare_char")
    assert truth <= loss <= truth + 0.01


@pytest.mark.parametrize("rung", sorted(path.stem for path in (REPOSITORY / "config" / "lecture").glob("*.py")))
def test_every_rung_of_the_lecture_learns_and_writes_past_its_context(dataset, capsys, rung):
    short = ["--max_iters=4", "--batch_size=4", "--block_size=8", "--warmup_iters=1", "--eval_iters=4", "--device=cpu"]
    train.main([f"config/lecture/{rung}.py", *short])
    found = losses(capsys.readouterr().out)
    assert found[4][1] < found[0][1]
    sample.main([f"--out_dir=out/lecture/{rung}", "--start=the king", "--max_new_tokens=30"])
    assert len(capsys.readouterr().out) == 8 + 30 + 1
