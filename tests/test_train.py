"""What train.py promises to who trains.

A step is that of the papers, on the batch that seed and step name, at the scheduled rate, however the batch is divided.
An evaluation reads the same blocks each time; best.pt is the step at which it found the lowest loss. A resumed run ends
in the bits of the uninterrupted one: what is not given follows the checkpoint, what does not fit it is refused in one
line, and no run is overwritten unasked. What is not finite ends the run before it is saved. Log, console and
TensorBoard show the same figures; a log that cannot be written ends nothing. Then what a hacker may rely on.

Kills and signals are in test_crash.py, several processes in test_distributed.py, GPUs in test_cuda.py, too.
"""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, WORDS, checkpoint, losses, reports, rows, same, without_progress
from tensorboard.backend.event_processing import event_accumulator

import prepare
import sample
import train
from config import ConfigError, UserError, run
from model import GPT, GPTConfig, choose_device, choose_dtype, peak_flops, training_dtype
from prepare import load_meta
from train import Optimizer, Process, Tokens, TrainConfig, batch, learning_rate, mean_loss

ALONE = Process(0, 1, torch.device("cpu"), torch.float32)
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)
# A run of 4 steps, which reports each and evaluates at 0, 2 and 4.
TINY = conftest.TINY | {"n_layer": 1, "max_iters": 4, "eval_interval": 2, "eval_iters": 2, "log_interval": 1}
TINY |= {"warmup_iters": 2, "lr_decay_iters": 6}  # so that a shorter run has the same rates


def tiny(**changes):
    return [f"--{name}={value}" for name, value in (TINY | changes).items()]


def train_here(**changes):
    return train.main(tiny(**changes))


def config(**changes):
    return TrainConfig(**TINY | changes)


def metrics(loss, grad_norm):
    """What a step returns."""
    return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(grad_norm)}


def tokens(split="train"):
    return Tokens("shakespeare_char", split, load_meta("shakespeare_char"), TINY["block_size"])


def state_of(model, step=0, optimizer=None, scaler=UNSCALED):
    return train.State(model, optimizer, scaler, {}, step=step)


def before_step(monkeypatch, act):
    """`act(state)` is called before each step that a run takes."""

    def step(model, state, *rest, original=train.train_step):
        act(state)
        return original(model, state, *rest)

    monkeypatch.setattr(train, "train_step", step)


def evaluations(monkeypatch, *val_losses):
    """The validation losses that the next evaluations find."""
    found = iter(val_losses)
    monkeypatch.setattr(train, "evaluate", lambda *_: {"train_loss": 1.0, "val_loss": next(found)})


def files(folder="out"):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.*")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with the dataset of conftest.py, and in out/ a run of 4 steps."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "config").symlink_to(REPOSITORY / "config")
    text = folder / "data" / "shakespeare_char" / "input.txt"
    text.parent.mkdir(parents=True)
    text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, size=5000))[:20_000])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        train_here()
    return folder


@pytest.fixture
def dataset(ran, tmp_path, monkeypatch, capsys):
    """data/shakespeare_char in an empty working directory."""
    shutil.copytree(ran, tmp_path, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return tmp_path / "data" / "shakespeare_char"


@pytest.fixture
def trained(ran, dataset):
    """The same, with the run."""
    shutil.copytree(ran / "out", "out")
    return Path("out")


# Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate=1e-5", "--min_lr=1e-4"], "min_lr (0.0001) must not be above learning_rate (1e-05)"),
        (["--out_dir="], "out_dir is empty: it must name a folder"),
        (["--gradient_accumulation_steps=3"],
         "batch_size (32) must be divisible by the number of processes (1) x gradient_accumulation_steps (3)"),
        (["--device=gpu"], "device 'gpu' is not available; available: cpu"),
        (["--device=cpu", "--dtype=float16"],
         "float16 needs the loss scaling of a cuda device, found cpu; use bfloat16 or float32"),
        (["--init_from=gpt5"], "there is no checkpoint in gpt5; python train.py makes one"),
        (["--init_from=resume"], "there is no out/ckpt.pt to resume; --init_from=scratch starts a new run"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_are_named_before_anything_is_done(folder, arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        train.main(arguments)
    assert str(error.value) == message
    assert not files()  # at most a lock


def test_each_key_has_its_limits(folder):
    for key in ("n_layer=-1", "n_embd=0", "dropout=1", "batch_size=0", "max_iters=0", "learning_rate=nan", "beta1=-0.1",
                "beta2=1", "lr_decay_iters=0", "grad_clip=-1", "eval_interval=0", "eval_iters=-1", "log_interval=0",
                "seed=-1", f"seed={2**63}", "dtype=float64", "optimizer=sgd", "model=rnn", "compile=2"):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^--{key.split('=')[0]} must be .*, found '{key.split('=')[1]}'$"):
            train.main([f"--{key}"])


# The run


def test_a_run_takes_the_steps_up_to_max_iters_each_at_the_scheduled_rate(dataset, monkeypatch):
    steps = []
    before_step(monkeypatch, lambda state: steps.append(state.step))
    train_here(max_iters=5, eval_interval=3)
    assert steps == [0, 1, 2, 3, 4]
    assert checkpoint()["step"] == 5
    logged = [float(row["lr"]) for row in reports()]
    assert logged == pytest.approx([learning_rate(step, config()) for step in range(5)], rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 35: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 60: 0.55, 110: 0.1, 500: 0.1}),
        ({"lr_decay_iters": 60}, {35: 0.55, 60: 0.1, 109: 0.1}),
        ({"decay_lr": False}, {0: 0.1, 9: 1, 10: 1, 109: 1}),
        ({"warmup_iters": 0}, {0: 1, 55: 0.55, 110: 0.1}),
    ],
)
def test_the_learning_rate_warms_up_linearly_and_decays_by_a_cosine_unless_told_otherwise(keys, expected):
    schedule = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110, "lr_decay_iters": None}
    found = {step: learning_rate(step, config(**schedule | keys)) for step in expected}
    assert found == pytest.approx(expected)


# One step: its batch


def test_a_batch_is_that_of_seed_and_step_with_the_next_tokens_as_targets(dataset):
    data = tokens()
    x, y = batch(data, 3, 0, config(), ALONE)
    assert x.shape == y.shape == (8, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    text = np.fromfile(dataset / "train.bin", "<u2").tobytes()
    for row, target in zip(x, y, strict=True):
        assert torch.cat((row, target[-1:])).numpy().astype("<u2").tobytes() in text
    # Neither is one seed another one, shifted by some steps.
    batches = [batch(data, step, 0, config(seed=seed), ALONE)[0] for seed in range(3) for step in range(3)]
    again = [batch(data, step, 0, config(seed=seed), ALONE)[0] for seed in range(3) for step in range(3)]
    assert same(batches, again)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


def test_every_start_of_the_text_is_drawn_from_the_first_to_the_last(dataset):
    np.arange(50, dtype="<u2").tofile(dataset / "train.bin")
    data = Tokens("shakespeare_char", "train", {"vocab_size": 50}, 16)
    drawn = torch.cat([batch(data, step, 0, config(), ALONE)[0][:, 0] for step in range(200)])
    assert set(drawn.tolist()) == set(range(50 - 16))


@pytest.mark.parametrize(("world_size", "shares"), [(1, 4), (2, 2), (4, 2)])
def test_processes_and_micro_batches_divide_the_same_batch_among_them(dataset, world_size, shares):
    data, divided = tokens(), config(gradient_accumulation_steps=shares)
    parts = [
        batch(data, 5, share, divided, Process(rank, world_size, torch.device("cpu"), torch.float32))[0]
        for rank in range(world_size)
        for share in range(shares)
    ]
    assert torch.equal(torch.cat(parts), batch(data, 5, 0, config(), ALONE)[0])


def test_a_divided_batch_changes_memory_not_learning(dataset):
    settings = {"batch_size": 6, "dropout": 0.0, "max_iters": 2, "learning_rate": 1e-4, "min_lr": 0}
    for shares in (1, 3):
        train_here(**settings, gradient_accumulation_steps=shares, optimizer="muon", out_dir=f"out/{shares}")
    whole, divided = (checkpoint(f"out/{shares}/ckpt.pt")["model"] for shares in (1, 3))
    torch.testing.assert_close(divided, whole, rtol=0, atol=2e-6)
    for name in ("loss", "grad_norm"):
        whole, divided = ([float(row[name]) for row in reports(f"out/{shares}/log.csv")] for shares in (1, 3))
        assert divided == pytest.approx(whole, rel=1e-4)


def test_every_seed_step_rank_and_micro_batch_has_a_dropout_of_its_own():
    """None is that of another one, as it would be if the four were added up."""
    found = []
    for seed, step, rank, micro_step in [*itertools.product(range(2), repeat=4)] * 2:
        train.seed_dropout(step, micro_step, config(seed=seed), Process(rank, 2, torch.device("cpu"), torch.float32))
        found.append(torch.rand(()).item())
    assert found[:16] == found[16:]
    assert len(set(found)) == 2**4


def test_tokens_are_read_as_they_are_and_refused_where_they_cannot_be(dataset):
    ids = np.fromfile(dataset / "val.bin", "<u2")
    assert Tokens("shakespeare_char", "val", load_meta("shakespeare_char"), 1999).blocks(np.array([0]), 1999).size
    with pytest.raises(UserError, match=r"val\.bin has 2000 tokens, too few for block_size 2000"):
        train_here(block_size=2000)
    ids[40] = 21
    ids.tofile(dataset / "val.bin")
    with pytest.raises(OSError, match=r"data/shakespeare_char/val.bin has token id 21; the vocabulary has"):
        train_here()
    np.arange(65536, dtype="<u2").tofile(dataset / "train.bin")
    data = Tokens("shakespeare_char", "train", {"vocab_size": 65536}, 16)
    assert data.blocks(np.array([65500]), 16).tolist() == [list(range(65500, 65517))]


# One step: its gradient and the optimizer


@pytest.mark.parametrize("grad_clip", [0.05, 0])
def test_a_step_is_adamws_on_the_clipped_gradient_of_the_batch_with_decay_of_matrices_alone(dataset, grad_clip):
    """From the weights that the seed gives. grad_clip=0 means no clipping."""
    keys = {"dropout": 0.0, "grad_clip": grad_clip, "beta1": 0.5, "beta2": 0.7, "weight_decay": 3.0, "max_iters": 2}
    settings = config(**keys)
    torch.manual_seed(settings.seed)
    model = GPT(settings.model_config(load_meta("shakespeare_char")["vocab_size"]))
    groups = [{"params": [p], "weight_decay": 3.0 * (p.dim() == 2)} for p in model.parameters()]
    adamw = torch.optim.AdamW(groups, betas=(0.5, 0.7))
    for step in range(2):
        model(*batch(tokens(), step, 0, settings, ALONE))[1].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        assert norm > 0.05
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, settings)
        adamw.step()
        adamw.zero_grad()
    train_here(**keys)
    torch.testing.assert_close(checkpoint()["model"], dict(model.state_dict()), rtol=1e-4, atol=1e-6)
    assert float(reports()[-1]["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_muon_takes_the_matrices_inside_the_blocks_adamw_the_rest_and_only_matrices_decay(kind):
    model = GPT(config(bias=True, n_layer=2).model_config(11))
    optimizer = Optimizer(model, config(optimizer=kind, weight_decay=0.3))
    groups = optimizer.param_groups
    by_muon = {id(p) for group in groups if group["update"] == optimizer.muon for p in group["params"]}
    assert by_muon == {id(p) for p in model.transformer.h.parameters() if p.dim() == 2 and kind == "muon"}
    decays = [(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(decays) == len(list(model.parameters()))
    assert set(decays) == {(2, 0.3), (1, 0)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # of Muon's products; float16 underflows
        assert Optimizer(model, config(), dtype).dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_muons_step_is_that_of_its_formulas_in_float64(shape):
    """Momentum, Nesterov's look ahead, five iterations and the scale, written out for one matrix after the other."""
    torch.manual_seed(0)
    block = torch.nn.ParameterDict({name: torch.randn(shape, dtype=torch.float64) for name in "ab"})
    model = torch.nn.ModuleDict({"transformer": torch.nn.ModuleDict({"h": block})})
    optimizer = Optimizer(model, config(optimizer="muon", weight_decay=0.3), torch.float64)
    [group] = optimizer.param_groups
    expected = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in expected]
    for group["lr"] in (0.1, 0.05):
        for p, w, m in zip(model.parameters(), expected, momenta, strict=True):
            p.grad = torch.randn_like(p)
            m.copy_(0.95 * m + 0.05 * p.grad)
            x = 0.95 * m + 0.05 * p.grad
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            w.copy_(w - group["lr"] * 0.3 * w - group["lr"] * 0.2 * max(shape) ** 0.5 * x)
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected, rtol=1e-5, atol=1e-6)
    assert not train.orthogonal(torch.zeros(1, *shape)).any()  # a matrix without gradient stays where it is


def test_the_bigram_table_learns_with_either_optimizer_and_resumes(dataset, capsys):
    """It has no block: AdamW takes all of it."""
    wild = {"model": "bigram", "learning_rate": 0.5, "decay_lr": False, "eval_interval": 100}
    for optimizer in ("muon", "adamw"):
        train_here(**wild, optimizer=optimizer, max_iters=4, out_dir=optimizer)
    assert same(*(checkpoint(f"{optimizer}/ckpt.pt")["model"] for optimizer in ("muon", "adamw")))
    train_here(**wild, max_iters=10, out_dir="adamw")
    assert losses(capsys.readouterr().out)[10][1] < 2.5
    assert list(checkpoint("adamw/ckpt.pt")["model"]) == ["lm_head.weight"]
    with pytest.raises(ConfigError, match=r"^adamw/best.pt holds another model .* \(block_size 16 -> 4\)"):
        train_here(model="bigram", init_from="adamw/best.pt", block_size=4)  # it has no context to crop


def test_bfloat16_training_learns_nearly_the_same_and_a_run_may_change_to_it(dataset):
    for dtype in ("float32", "bfloat16"):
        train_here(dtype=dtype, out_dir=dtype, learning_rate=1e-2)
    plain, rounded = (float(rows(f"{dtype}/log.csv")[-1]["val_loss"]) for dtype in ("float32", "bfloat16"))
    assert rounded != plain
    assert rounded == pytest.approx(plain, abs=0.02)
    assert {tensor.dtype for tensor in checkpoint("bfloat16/ckpt.pt")["model"].values()} == {torch.float32}
    train_here(dtype="bfloat16", out_dir="float32", max_iters=5)
    assert checkpoint("float32/ckpt.pt")["step"] == 5


# One step: the scale of float16


def with_scaler_of(monkeypatch, init_scale):
    """As on a GPU in float16: the gradients are scaled, first by `init_scale`; those that overflow are skipped."""

    def scaled(*given, original=torch.amp.GradScaler, **_):
        return original("cpu", init_scale=init_scale)

    monkeypatch.setattr("torch.amp.GradScaler", scaled)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_stopped_while_all_gradients_overflow_resumes(dataset, monkeypatch, optimizer):
    settings = {"optimizer": optimizer, "eval_interval": 100}
    with_scaler_of(monkeypatch, 2.0**127)
    train_here(**settings, max_iters=1)
    assert checkpoint()["scaler"]["scale"] == 2.0**126
    assert rows()[1]["grad_norm"] in ("inf", "nan")
    train_here(**settings, max_iters=8)  # the scale is halved until a step counts
    train_here(**settings, max_iters=8, out_dir="whole")
    assert same(checkpoint()["model"], checkpoint("whole/ckpt.pt")["model"])
    assert float(reports()[-1]["grad_norm"]) < 100


# Evaluation


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("n_tokens", [5000, 1600, 15, 1])
def test_evaluation_is_the_mean_over_the_tokens_of_the_first_blocks_or_of_spread_ones(dataset, n_tokens, spread):
    """Of all 1,999 where more are asked for, the last block shorter."""
    torch.manual_seed(0)
    data = tokens("val")
    model = GPT(config(dropout=0.5).model_config(data.vocab_size))
    ids = torch.from_numpy(np.fromfile(dataset / "val.bin", "<u2").astype(np.int64))
    total, n = 0.0, min(n_tokens, 1999)
    model.eval()
    for first in range(0, n, 16):
        start = first * 1999 // n if spread else first
        end = start + min(16, n - first)
        logits = model(ids[None, start:end])[0].detach()
        total -= logits.log_softmax(-1)[0, range(end - start), ids[start + 1 : end + 1]].sum().item()
    model.train()
    assert mean_loss(model, data, n_tokens, config(), ALONE, spread) == pytest.approx(total / n, rel=1e-5)
    assert model.training


def test_the_batches_of_an_evaluation_hold_each_block_once_evenly_over_the_split():
    batches = train.evaluation_batches(n_tokens=75, among=150, length=10, rows=3)
    assert [(starts.tolist(), length) for starts, length in batches] == [
        ([0, 20, 40], 10), ([60, 80, 100], 10), ([120], 10), ([140], 5),
    ]  # fmt: skip


def test_an_evaluation_has_no_dropout_and_keeps_no_graph_and_a_step_after_it_has_both(dataset, monkeypatch):
    found, hidden = [], GPT.hidden

    def noted(self, *inputs):
        found.append((self.training, torch.is_grad_enabled()))
        return hidden(self, *inputs)

    monkeypatch.setattr(GPT, "hidden", noted)
    train_here(max_iters=1)
    assert found == [(False, False)] * 2 + [(True, True)] + [(False, False)] * 2


def test_eval_iters_counts_the_first_batches_of_validation_and_as_much_of_all_of_the_train_split(dataset):
    state, splits, _ = train.start(config())
    for eval_iters, n_tokens in ((3, 3 * 8 * 16), (0, 1999)):
        found = train.evaluate(state, splits, config(eval_iters=eval_iters), ALONE)
        assert found["val_loss"] == mean_loss(state.model, splits["val"], n_tokens, config(), ALONE)
        spread, first = (mean_loss(state.model, splits["train"], n_tokens, config(), ALONE, s) for s in (True, False))
        assert found["train_loss"] == spread != first


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_bits_per_byte_of_the_whole_split_compare_tokenizers(folder, capsys, tokenizer):
    Path("mine.txt").write_text("Wär ich ein Vöglein, flög ich zu dir. " * 100)
    prepare.main(["--dataset=mine", "--input=mine.txt", f"--tokenizer={tokenizer}"])
    train_here(dataset="mine", eval_only=True, eval_iters=1, batch_size=1)
    assert "bits per byte" not in capsys.readouterr().out  # of a part of the split: its bytes are not known
    train_here(dataset="mine", eval_only=True, eval_iters=0)
    out = capsys.readouterr().out
    ids = np.fromfile("data/mine/val.bin", "<u2")
    n_bytes = len(prepare.tokenizer_of(load_meta("mine")).decode(ids).encode())
    [said] = re.findall(r"^step 0: .*, val loss [\d.]+, ([\d.]+) bits per byte$", out, re.MULTILINE)
    assert float(said) == pytest.approx(losses(out)[0][1] / math.log(2) * len(ids) / n_bytes, abs=0.006)


def test_eval_only_evaluates_and_writes_nothing(trained, capsys):
    before = files()
    expected = float(rows()[-1]["val_loss"])
    train_here(eval_only=True, tensorboard=True, max_iters=2)  # past which it takes no step anyway
    assert losses(capsys.readouterr().out)[4][1] == pytest.approx(expected, abs=1e-4)
    assert {path.name: path.read_bytes() for path in trained.iterdir()}.items() >= before.items()
    assert files() == before
    train_here(eval_only=True, tensorboard=True, out_dir="new")
    assert not Path("new").exists()
    out = capsys.readouterr().out
    assert losses(out).keys() == {0}
    assert "best validation loss" not in out


# The best model


def test_best_is_the_model_of_the_lowest_validation_loss_after_step_0_also_after_a_resume(dataset, monkeypatch, capsys):
    said = r"^best validation loss 2.0000 at step 2, last {}, after (\d+) s; try python sample.py --out_dir=out$"
    evaluations(monkeypatch, 1.0, 3.0, 2.0, 2.5)  # of steps 0 to 3
    train_here(max_iters=3, eval_interval=1)
    assert re.search(said.format("2.5000"), capsys.readouterr().out, re.M)
    best, before = checkpoint("out/best.pt"), files()
    assert (best["step"], best["best_step"], best["best_val_loss"]) == (2, 2, 2.0)
    log = [line.split(",") for line in Path("out/log.csv").read_text().splitlines()]
    log[-2][1] = "1000.25"  # seconds of all starts together; the evaluation after it is repeated
    Path("out/log.csv").write_text("".join(",".join(row) + "\n" for row in log))
    evaluations(monkeypatch, 2.5, 2.2)
    train_here(max_iters=4, eval_interval=1)
    assert 1000 <= int(re.search(said.format("2.2000"), capsys.readouterr().out, re.M)[1]) < 1100
    assert files()["best.pt"] == before["best.pt"]
    evaluations(monkeypatch, 2.0, 2.0)
    train_here(max_iters=2, out_dir="two")
    assert same(best["model"], checkpoint("two/ckpt.pt")["model"])


@pytest.mark.parametrize(
    ("eval_iters", "changes", "starts_over"),
    [
        (2, {"eval_iters": 0}, True),
        (2, {"eval_iters": 1}, True),
        (2, {"batch_size": 4}, True),
        (2, {"learning_rate": 1e-4}, False),
        (0, {"batch_size": 4}, False),  # the whole split all the same
        (0, {"best.pt": "gone"}, True),
    ],
)
def test_where_what_is_evaluated_has_changed_or_is_gone_the_best_starts_over(
    dataset, capsys, monkeypatch, eval_iters, changes, starts_over
):
    evaluations(monkeypatch, 3.0, 1.0, 2.0)
    train_here(eval_iters=eval_iters)
    changes = {"eval_iters": eval_iters} | changes
    if changes.pop("best.pt", None):
        Path("out/best.pt").unlink()
    evaluations(monkeypatch, 2.0, 3.0)
    train_here(**changes, max_iters=5)
    assert ("the lowest loss starts over\n" in capsys.readouterr().out) == starts_over
    expected = (4, 2.0) if starts_over else (2, 1.0)
    for name in ("ckpt.pt", "best.pt"):
        found = checkpoint(f"out/{name}")
        assert (found["best_step"], found["best_val_loss"]) == expected
    assert found["step"] == expected[0]


# Starting, saving and resuming


@pytest.mark.parametrize("seconds", [30, 90])
def test_a_text_edited_after_it_was_prepared_is_told_with_the_command_that_prepares_it(dataset, capsys, seconds):
    """A copied folder, whose files may be as new as the copy, was not edited."""
    again = ["--dataset=shakespeare_char", "--tokenizer=data/shakespeare_char/meta.json", "--val_fraction=0.2"]
    prepare.main(again)
    text, meta = dataset / "input.txt", dataset / "meta.json"
    text.write_text(text.read_text() * 2)
    edited = text.stat().st_mtime
    os.utime(meta, (edited - seconds, edited - seconds))
    train_here(max_iters=1)
    told = re.findall("input.txt is newer .*: python prepare.py (.*) makes new ones", capsys.readouterr().out)
    assert told == [" ".join(again)] * (seconds > 60)
    assert load_meta("shakespeare_char")["train_tokens"] == 16_000
    prepare.main(again)
    train_here(max_iters=1, init_from="scratch")
    assert "is newer" not in capsys.readouterr().out
    assert load_meta("shakespeare_char")["train_tokens"] == 32_000


def test_a_long_run_on_a_cpu_says_the_hours_that_are_left_before_its_first_evaluation(trained, capsys, monkeypatch):
    work = train.flops_of_run(GPT(config().model_config(21)), config(max_iters=4000))
    monkeypatch.setattr(train, "CPU_FLOPS", work / torch.get_num_threads() / 3600 / 10)
    torch.save(checkpoint() | {"step": 2000}, "out/ckpt.pt")
    for out_dir, max_iters, hours in (("new", 390, None), ("new", 4000, "10.0"), ("out", 4000, "5.0")):
        train.start(train.read(TrainConfig, tiny(out_dir=out_dir, max_iters=max_iters)))
        small = "python train.py config/shakespeare_char_cpu.py takes a minute or two"
        line = f"this takes hours on a CPU, on one like ours about {hours}; {small}\n"
        assert capsys.readouterr().out.partition("on 1 x cpu, float32\n")[2] == (line if hours else "")
    gpu = Process(0, 1, torch.device("cuda"), torch.bfloat16)
    train.warn_of_hours(state_of(GPT(config().model_config(21))), config(max_iters=4000), gpu)
    assert capsys.readouterr().out == ""


def test_checkpoints_have_the_promised_content(trained):
    whole, best = checkpoint(), checkpoint("out/best.pt")
    common = {"format", "model", "model_config", "step", "config", "tokenizer", "sha256", "train_tokens"}
    common |= {"best_val_loss", "best_step"}
    assert set(whole) == common | {"optimizer", "scaler"}
    assert set(best) == common
    assert (whole["best_step"], whole["best_val_loss"]) == (best["best_step"], best["best_val_loss"])
    assert best["best_step"] == best["step"] == 4  # so it is known before another evaluation
    assert whole["format"] == 1
    assert whole["step"] == 4
    assert whole["scaler"] == {}
    assert whole["config"] == dataclasses.asdict(config())
    meta = json.loads(Path("data/shakespeare_char/meta.json").read_text())
    assert (whole["tokenizer"]["chars"], whole["sha256"]) == (meta["chars"], meta["sha256"])
    assert all(tensor.dtype == torch.float32 for tensor in whole["model"].values())
    assert set(whole["model"]) == set(GPT(config().model_config(5)).state_dict())


@pytest.mark.parametrize(
    ("dtype", "optimizer", "threads"), [("float32", "adamw", 1), ("bfloat16", "muon", 1), ("float32", "muon", 2)]
)
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(
    dataset, capsys, monkeypatch, request, dtype, optimizer, threads
):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    settings = {"dtype": dtype, "optimizer": optimizer, "eval_iters": 1}
    settings |= {"n_embd": 128, "batch_size": 32} if threads > 1 else {}  # enough work to be shared
    train_here(**settings, out_dir="whole")
    expected = losses(capsys.readouterr().out)
    with monkeypatch.context() as crashing:
        before_step(crashing, lambda state: 1 / (state.step - 3))
        with pytest.raises(ZeroDivisionError):
            train_here(**settings)
    torch.manual_seed(999)  # nothing may depend on what the process did before
    train_here(**settings)
    output = capsys.readouterr().out
    assert "resuming from out/ckpt.pt at step 2\n" in output
    assert losses(output) == expected
    whole, resumed = checkpoint("whole/ckpt.pt"), checkpoint()
    whole["config"]["out_dir"] = "out"
    assert same(whole, resumed)
    timing = {"seconds": None, "tokens_per_second": None}
    assert [row | timing for row in rows()] == [row | timing for row in rows("whole/log.csv")]
    seconds = [float(row["seconds"]) for row in rows()]
    assert seconds == sorted(seconds)


def test_what_is_not_given_follows_the_checkpoint_and_what_is_given_counts(dataset, capsys, monkeypatch):
    """Not the defaults, which are another optimizer's."""
    train_here(max_iters=2, learning_rate=2e-3, weight_decay=0.2)
    shutil.copytree("out", "other")
    train_here(max_iters=3, learning_rate=2e-3, weight_decay=0.2, out_dir="other")
    for name in ("optimizer", "learning_rate", "min_lr", "weight_decay"):
        monkeypatch.delitem(TINY, name)
    capsys.readouterr()
    train_here(max_iters=3)
    kept = "optimizer 'adamw', learning_rate 0.002, min_lr 0.0001, weight_decay 0.2"
    assert f"changed since: max_iters 2 -> 3; as in the checkpoint: {kept}\n" in capsys.readouterr().out
    assert same(checkpoint()["model"], checkpoint("other/ckpt.pt")["model"])
    assert {"optimizer": "adamw", "learning_rate": 2e-3}.items() <= checkpoint()["config"].items()
    Path("recipe.py").write_text("optimizer = 'muon'; learning_rate = 0.01; min_lr = 0.0")
    with pytest.raises(ConfigError, match=r"\(optimizer 'adamw' -> 'muon'\); take another --out_dir"):
        train.main(["recipe.py", *tiny(max_iters=4)])
    # Keys are compared when they have followed: this min_lr is above the run's learning_rate, not above the default.
    with pytest.raises(ConfigError, match=r"^min_lr \(0.005\) must not be above learning_rate \(0.002\)$"):
        train_here(max_iters=4, min_lr=0.005)
    train_here(learning_rate=1e-3, dropout=0.3, max_iters=4)
    changed = "changed since: dropout 0.1 -> 0.3, learning_rate 0.002 -> 0.001, max_iters 3 -> 4; as in the checkpoint"
    assert f"resuming from out/ckpt.pt at step 3; {changed}" in capsys.readouterr().out
    assert float(reports()[-1]["lr"]) == pytest.approx(learning_rate(3, config(learning_rate=1e-3, min_lr=1e-4)))
    assert checkpoint()["model_config"]["dropout"] == 0.3
    torch.save(checkpoint() | {"config": checkpoint()["config"] | {"weight_decay": "x"}}, "out/ckpt.pt")
    with pytest.raises(UserError, match=r"^out/ckpt.pt: weight_decay must be a number, at least 0, found 'x'$"):
        train_here(max_iters=5)


def test_a_run_that_has_moved_takes_neither_folder_nor_machine_from_its_checkpoint(dataset, capsys, monkeypatch):
    train_here(max_iters=1, out_dir="old", compile=False, tensorboard=True)
    Path("old").rename("out")
    monkeypatch.delitem(TINY, "device")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    capsys.readouterr()
    train_here(max_iters=2)
    assert "at step 1; changed since: max_iters 1 -> 2\n" in capsys.readouterr().out
    own = {"out_dir": "out", "device": "auto", "compile": "auto", "tensorboard": False}
    assert own.items() <= checkpoint()["config"].items()
    assert checkpoint()["step"] == 2
    assert not Path("old").exists()


def test_a_finished_run_is_evaluated_and_one_past_max_iters_refused(trained, capsys, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step is taken"))
    before, content = files(), checkpoint()
    with pytest.raises(ConfigError, match=r"^out/ckpt.pt is at step 4, past --max_iters=3: raise it, or take"):
        train_here(max_iters=3)
    assert files() == before
    capsys.readouterr()
    train_here()
    assert losses(capsys.readouterr().out).keys() == {4}
    assert same(checkpoint(), content)
    del content["config"]["eval_iters"], content["sha256"], content["train_tokens"]
    torch.save(content, "out/ckpt.pt")  # an older one: a key that it lacks had its default then
    train_here()
    assert "resuming from out/ckpt.pt at step 4; changed since: eval_iters 0 -> 2\n" in capsys.readouterr().out
    assert checkpoint()["sha256"] == load_meta("shakespeare_char")["sha256"]


def test_a_checkpoint_of_another_shape_is_refused_and_kept(trained):
    """Whatever belongs to the shape: all that GPTConfig has, but for dropout."""
    before = files()
    shape = {field.name: before for field in dataclasses.fields(GPTConfig)} | {"model": "gpt"}
    refused = "out/ckpt.pt holds another model or text or optimizer than asked for ({}); take another --out_dir, where "
    for name in shape.keys() - {"vocab_size", "dropout"}:
        old = (checkpoint()["model_config"] | {"model": "gpt"})[name]
        new = "bigram" if name == "model" else not old if isinstance(old, bool) else 2 * old
        with pytest.raises(ConfigError) as error:
            train_here(**{name: new}, max_iters=5)
        start = refused.format(f"{name} {old!r} -> {new!r}")
        assert str(error.value) == start + "--init_from=out/ckpt.pt fine-tunes these weights"
    assert files() == before
    train_here(n_layer=2, init_from="scratch", max_iters=1)
    assert checkpoint()["step"] == 1
    assert [row["step"] for row in rows()] == ["0", "1", "1"]


@pytest.mark.parametrize(
    ("prepared", "difference"),
    [
        ("--dataset=other --input=other.txt", "vocab_size 21 -> 22, chars '.*"),
        (
            "--dataset=shakespeare_char --input=reversed.txt",
            "sha256 '.*' -> '.*'",
        ),  # of the same characters and the same length
        ("--val_fraction=0.2", "train_tokens 18000 -> 16000"),  # the best loss would be of another validation text
    ],
)
def test_a_checkpoint_of_another_text_is_refused_and_kept(trained, prepared, difference):
    before, text = files(), Path("data/shakespeare_char/input.txt").read_text()
    Path("other.txt").write_text(text + "!")
    Path("reversed.txt").write_text(text[::-1])
    prepare.main(prepared.split())
    with pytest.raises(ConfigError, match=rf"^out/ckpt.pt holds another .* \({difference}\); take another --out_dir"):
        train_here(dataset="other" if "other" in prepared else "shakespeare_char")
    assert files() == before


def test_weights_that_do_not_fit_are_refused_with_the_way_that_works(trained):
    """Another vocabulary: prepare the text in the weights' tokens. Another shape: leave it to them."""
    Path("mine.txt").write_text("fair land " * 500)
    prepare.main(["--dataset=mine", "--input=mine.txt"])
    fine = {"init_from": "out/best.pt", "out_dir": "fine", "max_iters": 1}
    with pytest.raises(ConfigError) as error:
        train_here(**fine, dataset="mine")
    way = "python prepare.py --dataset=NAME --input=FILE --tokenizer=out/best.pt"
    assert re.fullmatch(rf"out/best.pt holds another model .* \(vocab_size .*\); .*; {way} makes .*", str(error.value))
    prepare.main(way.replace("NAME", "mine").replace("FILE", "mine.txt").split()[2:])
    with pytest.raises(ConfigError, match=r"\(n_layer 1 -> 3, n_embd 32 -> 64\); leave out keys of the shape"):
        train_here(**fine, dataset="mine", n_layer=3, n_embd=64)
    train_here(**fine, dataset="mine")
    assert checkpoint("fine/ckpt.pt")["step"] == 1


class Hostile:
    def __reduce__(self):
        return (open, ("code_was_run", "w"))


def test_damaged_and_hostile_checkpoints_are_refused_in_one_line(trained):
    path, content = trained / "ckpt.pt", checkpoint()
    data = path.read_bytes()
    flipped = data.index(content["model"]["transformer.wte.weight"].numpy().tobytes()) + 100
    (trained / "best.pt").unlink()
    for damaged in (
        data[: len(data) // 2],
        data[:flipped] + bytes([data[flipped] ^ 1]) + data[flipped + 1 :],
        b"",
        b"no checkpoint",
        content | {"config": Hostile()},
        content | {"format": 2},
        content | {"model": content["model"] | {"transformer.wpe.weight": torch.zeros(3, 3)}},
        {"format": 1},
    ):
        path.write_bytes(damaged) if isinstance(damaged, bytes) else torch.save(damaged, path)
        for program in (train_here, lambda: sample.main([])):
            with pytest.raises(UserError, match=r"^cannot open out/ckpt.pt \(.+\); restore"):
                program()
    assert not Path("code_was_run").exists()


# What is not finite


@pytest.mark.parametrize(("step", "what"), [(3, "loss is nan, gradient norm nan"), (4, "weights are not finite")])
def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(dataset, monkeypatch, step, what):
    """The last update's no later loss would show."""

    def poisoned(model, state, *rest, original=train.train_step):
        found = original(model, state, *rest)
        if state.step + 1 == step:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)
        return found

    monkeypatch.setattr(train, "train_step", poisoned)
    rate = learning_rate(3, config())
    with pytest.raises(UserError, match=rf"^{what} at step 4, learning rate {rate:.1e}; .*Try a lower --learning_rate"):
        train_here()
    assert checkpoint()["step"] == 2
    assert all(tensor.isfinite().all() for tensor in checkpoint()["model"].values())


@pytest.mark.parametrize(
    ("scale", "loss", "norm", "said"),
    [
        (None, 1.0, math.inf, "at step 5"),
        (2.0, 1.0, math.inf, None),  # in float16: the scaler has skipped that step, and goes on with half the scale
        (0.5, 1.0, math.inf, "with the loss scaled by 0.5 at step 5"),  # but not for ever
        (None, math.inf, 1.0, "at step 5"),
        (2.0, math.nan, math.inf, "at step 5"),
    ],
)
def test_a_report_ends_the_run_unless_float16_has_skipped_the_step(folder, scale, loss, norm, said):
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    log = train.Log(config(), state_of(GPT(config().model_config(5)), step=5, scaler=scaler), ALONE)
    log.since_step = 4
    Path("out").mkdir()
    with pytest.raises(UserError, match=f"^loss is {loss}, gradient norm {norm} {said}, ") if said else nullcontext():
        log.report(metrics(loss, norm))
    assert Path("out/log.csv").exists() == (not said)


# Devices and compilers


def test_deterministic_asks_torch_for_it(dataset):
    train_here(max_iters=1, deterministic=True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with so many GPUs, or a Mac."""

    def pretend(gpus=0, mps=False):
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)

    return pretend


def test_the_best_device_is_chosen(machine):
    machine()
    assert choose_device("auto") == torch.device("cpu")
    machine(mps=True)
    assert choose_device("auto") == torch.device("mps")
    assert choose_device("auto", processes=2) == torch.device("cpu")
    machine(gpus=2, mps=True)
    assert choose_device("auto") == choose_device("auto", processes=2) == torch.device("cuda")
    assert choose_device("auto", processes=4) == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device 'cuda:2' is not available; available: cuda, mps, cpu, cuda:0, cuda:1"):
        choose_device("cuda:2")
    with pytest.raises(ValueError, match="device 'cuda' is not available for each of 4 processes; available: cpu"):
        choose_device("cuda", processes=4)


@pytest.mark.parametrize(
    ("name", "environment", "index"),
    [
        ("auto", {}, 0),
        ("cuda:1", {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "WORLD_SIZE": "1"}, 1),
        ("cuda", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "WORLD_SIZE": "4"}, 1),
    ],
)
def test_every_process_takes_a_gpu_of_its_own(machine, monkeypatch, name, environment, index):
    machine(gpus=2)
    chosen, joined = [], []
    monkeypatch.setattr("torch.cuda.set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda backend, device_id: joined.append((backend, device_id))
    )
    monkeypatch.setattr("torch.distributed.new_group", lambda **_: None)
    for variable, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | environment).items():
        monkeypatch.setenv(variable, value)
    process = train.join_processes(config(device=name, dtype="auto"))
    assert chosen == [process.device.index] == [index]
    alone = environment.get("WORLD_SIZE", "1") == "1"
    assert joined == ([] if alone else [("cpu:gloo,cuda:nccl", torch.device("cuda", index))])
    assert process.dtype == torch.bfloat16
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32: the safe dtype is safe


def test_the_fastest_safe_number_type_is_chosen(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for capabilities, dtype in (
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9005"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda found=capabilities: found, raising=False)
        assert training_dtype("auto", cpu) == dtype
        assert training_dtype("bfloat16", cpu) == torch.bfloat16
        assert choose_dtype("auto", cpu) == torch.float32
    assert training_dtype("auto", torch.device("mps")) == torch.float32
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(  # torch emulates it on any card
            "torch.cuda.is_bf16_supported", lambda including_emulation=True, own=supported: own or including_emulation
        )
        assert training_dtype("auto", cuda) == dtype
    assert training_dtype("float32", cuda) == torch.float32
    monkeypatch.delattr("torch.cpu.get_capabilities")  # as before torch 2.11
    assert training_dtype("auto", cpu) == torch.float32
    assert training_dtype("auto", cuda) == torch.float16


@pytest.mark.parametrize("processes", [1, 2])
def test_the_model_is_compiled_as_one_graph_and_once(dataset, monkeypatch, processes):
    graphs = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(train, "try_compiler", lambda device: None)
    monkeypatch.setattr("torch.compile", compiled)
    settings = config(compile=True, gradient_accumulation_steps=2)
    process = Process(0, processes, torch.device("cpu"), torch.float32)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        state = state_of(GPT(settings.model_config(65)))
        state.optimizer = Optimizer(state.model, settings)
        model = train.compiled_and_parallel(state.model, settings, process)
        for state.step in range(2):
            train.train_step(model, state, tokens(), settings, process)
            mean_loss(state.model, tokens("val"), 100, settings, process)
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == torch._dynamo.utils.counters["frames"]["total"] == 1  # it fits into one bucket of gradients


@pytest.mark.parametrize(
    ("device", "processes", "arguments", "expected"),
    [
        ("cuda", 1, [], ["recorded"]),  # as short as it is, compiling would take longer than it saves
        ("cuda", 2, [], ["averaged"]),  # DistributedDataParallel takes a module
        ("cuda", 1, ["--max_iters=20000"], ["compiled"]),
        ("cuda", 2, ["--max_iters=20000"], ["compiled", "averaged"]),
        ("cuda", 1, ["config/gpt2_124m.py"], ["compiled"]),
        ("cuda", 1, ["--compile=True"], ["compiled"]),
        ("cuda", 1, ["--compile=False"], []),
        ("cuda", 1, ["--gradient_accumulation_steps=2"], []),  # a second replay would overwrite the first gradients
        ("cpu", 1, ["config/gpt2_124m.py"], []),
        ("cpu", 1, ["--compile=True"], ["compiled"]),
    ],
)
def test_a_run_is_compiled_only_where_that_pays(gpus, monkeypatch, device, processes, arguments, expected):
    """By the work of the whole run: what is resumed computes what the uninterrupted run does."""
    done = []

    def noted(what):
        return lambda module, *_, **__: done.append(what) or module

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("torch.ones", lambda *_, device: None)
    monkeypatch.setattr(train, "try_compiler", lambda device: None)
    monkeypatch.setattr("torch.compile", noted("compiled"))
    monkeypatch.setattr("torch.cuda.make_graphed_callables", noted("recorded"))
    monkeypatch.setattr(train, "DistributedDataParallel", noted("averaged"))
    settings = train.read(TrainConfig, arguments)
    with torch.device("meta"):
        model = GPT(settings.model_config(50257 if "gpt2" in str(arguments) else 65))
    made = train.compiled_and_parallel(model, settings, Process(0, processes, torch.device(device), torch.bfloat16))
    assert done == expected
    assert (made is model) == (expected != ["recorded"])


def loses_gradients(function):
    """As torch 2.6's compiler does on a CPU, where two tokens are the same."""
    return lambda *given: 0.5 * (result := function(*given)) + 0.5 * result.detach()


@pytest.mark.parametrize(
    ("device", "place", "other", "said"),
    [
        (
            "cuda",
            "torch.cuda.make_graphed_callables",
            lambda *_: 1 / 0,
            "a CUDA graph does not work here (ZeroDivisionError)",
        ),
        ("cpu", "torch.compile", lambda _: lambda *_: 1 / 0, "torch.compile does not work here (ZeroDivisionError)"),
        ("cpu", "torch.compile", loses_gradients, "torch.compile does not work here (ArithmeticError)"),
    ],
)
def test_what_does_not_work_is_told_and_not_used(gpus, monkeypatch, capsys, device, place, other, said):
    monkeypatch.setattr(place, other)
    model, settings = GPT(config().model_config(65)), config(compile="auto" if device == "cuda" else True)
    process = Process(0, 1, torch.device(device), torch.bfloat16)
    assert train.compiled_and_parallel(model, settings, process) is model
    assert capsys.readouterr().out == f"{said}: training without it\n"


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_learns_the_same(dataset, capsys):
    for compiled in (False, True):
        train_here(max_iters=2, dropout=0.0, feed_forward=False, compile=compiled, out_dir=f"out/{compiled}")
    assert ("does not work" in capsys.readouterr().out) == torch.__version__.startswith("2.6.")  # which loses gradients
    plain, fused = ([float(row["loss"]) for row in reports(f"out/{c}/log.csv")] for c in (False, True))
    assert fused == pytest.approx(plain, abs=1e-4)
    assert not any("_orig_mod" in name for name in checkpoint("out/True/ckpt.pt")["model"])


# The log


@pytest.fixture
def always_due(monkeypatch):
    """Progress is shown whenever it can be, not twice a second: ten seconds pass between any two looks at the clock."""
    monkeypatch.setattr("config.time.monotonic", itertools.count(0, 10).__next__)
    monkeypatch.setattr(train.progress, "shown", -math.inf)


def test_the_console_and_the_log_show_the_same_run(dataset, capsys, always_due):
    train_here(log_interval=2, max_iters=5)
    captured = capsys.readouterr()
    lines = captured.out.splitlines() + captured.err.splitlines()
    number = r"\d+\.\d+"
    assert sum(bool(re.fullmatch(rf"step \d+: train loss {number}, val loss {number}", line)) for line in lines) == 4
    for split in ("train", "val"):
        assert f"evaluating data/shakespeare_char/{split}.bin: 0%" in lines
    header = Path("out/log.csv").read_text().splitlines()[0]
    assert header == "step,seconds,loss,train_loss,val_loss,bits_per_byte,lr,grad_norm,tokens_per_second,mfu"
    evaluated, reported = ([row for row in rows() if row[name]] for name in ("val_loss", "loss"))
    assert [int(row["step"]) for row in rows()] == [0, 1, 2, 2, 4, 4, 5, 5]  # a row each
    assert [int(row["step"]) for row in evaluated] == [0, 2, 4, 5]
    assert [int(row["step"]) for row in reported] == [1, 2, 4, 5]
    for names, found in ((("train_loss", "val_loss"), evaluated),
                         (("loss", "lr", "grad_norm", "tokens_per_second"), reported)):  # fmt: skip
        for row in found:
            assert {name for name in row if row[name]} == {"step", "seconds", *names}
    assert losses(captured.out)[5][1] == pytest.approx(float(rows()[-1]["val_loss"]), abs=1e-4)


def test_speed_and_the_time_that_is_left_are_those_of_training_alone(dataset, monkeypatch, capsys, always_due):
    """A step takes 1, later 2 and 3 seconds, an evaluation 100, by a clock of the test's own."""
    clock, evaluate = [0], train.evaluate

    def evaluated(*arguments):
        clock[0] += 100
        return evaluate(*arguments)

    def stepped(state):
        clock[0] += 1 + state.step // 3

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    before_step(monkeypatch, stepped)
    monkeypatch.setattr(train, "evaluate", evaluated)
    train_here(max_iters=9, eval_interval=6, log_interval=3)
    assert [float(row["tokens_per_second"]) for row in reports()] == pytest.approx([128, 128, 128 / 2, 128 / 3])
    progress = r"^step (\d)/9 \| loss \d\.\d\d \| lr \d\.\de-\d\d \| grad \d\.\d\d \| 0..k tok/s \| eta (.*)$"
    assert re.findall(progress, capsys.readouterr().err, re.M) == [
        ("1", "0:00:08"), ("3", "0:00:06"), ("6", "0:00:06"), ("9", "0:00:00"),
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 8])
def test_mfu_is_shown_where_the_peak_of_the_device_is_known(folder, capsys, monkeypatch, always_due, world_size):
    process = Process(0, world_size, torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(Process, "all_reduce", lambda self, values: values * world_size)
    model = GPT(config().model_config(5))
    for card, known in (("Some Other Card", False), ("NVIDIA H200", True)):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=card: name)
        log = train.Log(config(out_dir=card), state_of(model), process)
        log.state.step = 1
        log.report(metrics(2.0, 1.0))
        [row] = rows(f"{card}/log.csv")
        assert (row["loss"], row["grad_norm"]) == ("2", "1")
        assert ("| mfu " in capsys.readouterr().err) == bool(row["mfu"]) == known
    flops_per_token = 6 * (5 * 32 + 12 * 32**2) + 12 * 16 * 32  # six a weight, twelve T C an attention
    mfu = flops_per_token * float(row["tokens_per_second"]) / (989e12 * world_size)
    assert float(row["mfu"]) == pytest.approx(mfu, rel=1e-4)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**30)
    assert log.cost() == "0 s and at most 3.0 GiB of GPU memory"  # as the end of the run says


def test_peaks_are_those_of_the_card_in_16_bits(monkeypatch):
    peaks = {
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12,
        "NVIDIA A10": 125e12, "NVIDIA A10G": None, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12, "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12, "AMD Instinct MI300X": 1307e12, "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    }  # fmt: skip
    for card, peak in peaks.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=card: name)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert peak_flops(torch.device("cuda"), dtype) == (peak if dtype != torch.float32 else None), card


def test_rows_that_are_repeated_or_damaged_are_dropped_and_the_others_stay(trained):
    before = rows()
    with open("out/log.csv", "ab") as file:
        file.write(b"1,abc,,,,,,\n\xff\n" + bytes(200_000) + b'\n1,"\n2,-1,,,,,,,,\n2,3.1,2.')
    train_here(max_iters=5, eval_interval=3)
    assert rows()[: len(before)] == before  # no evaluation is due at 4
    *before, repeated = rows()
    assert repeated["val_loss"]
    train_here(max_iters=6, eval_iters=0, eval_interval=5)
    assert rows()[: len(before)] == before
    [row] = (row for row in rows()[len(before) :] if row["step"] == "5")
    assert row["bits_per_byte"] and not row["loss"]
    Path("out/log.csv").write_text("")
    train_here(max_iters=7)
    assert [row["step"] for row in rows()] == ["6", "7", "7"]


def test_a_log_and_curves_that_cannot_be_written_cost_no_step_and_no_row(dataset, monkeypatch, capsys):
    """On Windows, Excel keeps others from writing a file that it shows. Here a folder is in the way for some steps."""
    from torch.utils.tensorboard import SummaryWriter

    def in_the_way(state):
        if state.step == 1:
            Path("out/log.csv").rename("aside")
            Path("out/log.csv").mkdir()
        if state.step == 3:
            Path("out/log.csv").rmdir()
            monkeypatch.setattr(SummaryWriter, "add_scalar", full)

    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    train_here(out_dir="whole")
    before_step(monkeypatch, in_the_way)
    train_here(tensorboard=True)
    timing = {"seconds": "", "tokens_per_second": ""}
    assert [row | timing for row in rows()] == [row | timing for row in rows("whole/log.csv")]
    assert same(checkpoint()["model"], checkpoint("whole/ckpt.pt")["model"])
    said = re.findall("cannot write.*", capsys.readouterr().out)
    assert ["out/log.csv" in line for line in said] == [True, False]  # each once
    assert [*events()["loss"]] == [1, 2, 3]


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.5), (False, 5)])
def test_progress_is_shown_by_time_on_a_terminal_in_one_line(capsys, monkeypatch, terminal, seconds):
    now = [100.0]
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(train.progress, "shown", -math.inf)
    for tick in range(200):
        now[0] += 0.1
        train.progress.show(f"tick {tick}")
        if tick == 0:
            assert "tick" in capsys.readouterr().err  # said at once
    train.show("step 0")
    out, errors = capsys.readouterr()
    assert out == "step 0\n"
    assert errors.count("tick") == pytest.approx(20 / seconds, rel=0.3)
    erased = [line.split("\r\033[K")[-1] for line in errors.split("\n")]  # what a terminal shows
    assert "".join(erased) == ("" if terminal else errors.replace("\n", ""))


def events(out_dir="out"):
    """What TensorBoard finds: {name: {step: value}}."""
    found = event_accumulator.EventAccumulator(out_dir, {"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_the_log_changes_no_bit_and_forgets_steps_that_are_taken_again(dataset, monkeypatch):
    settings = {"dropout": 0.3, "eval_iters": 0, "eval_interval": 3}
    train_here(**settings, out_dir="plain", max_iters=5)
    found = []
    with monkeypatch.context() as flushed:  # an evaluation is shown while the run goes on, so after SIGKILL, too
        before_step(flushed, lambda state: found.append([*events()["val_loss"]]))
        flushed.delattr("tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem.append")  # only a flush writes
        train_here(**settings, tensorboard=True, max_iters=3)
    assert found == [[0]] * 3
    shutil.copy("out/ckpt.pt", "at 3.pt")
    train_here(**settings, tensorboard=True, max_iters=4)
    shutil.copy("at 3.pt", "out/ckpt.pt")  # as if it had been killed after step 4
    train_here(**settings, tensorboard=True, max_iters=5)
    assert same(checkpoint()["model"], checkpoint("plain/ckpt.pt")["model"])
    scalars = events()
    for name in ("loss", "train_loss", "val_loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second"):
        expected = {int(row["step"]): float(row[name]) for row in rows() if row[name]}
        assert len(expected) >= 3
        assert scalars[name] == pytest.approx(expected, rel=1e-5), name


# How a run ends


def test_a_best_model_without_its_checkpoint_is_not_overwritten_and_hints_can_be_pasted(dataset, capsys):
    """Though the path has a space."""
    train_here(out_dir="out/my run", max_iters=1)
    hint = re.search(r"try python (.*)\n$", capsys.readouterr().out)[1]
    sample.main([*shlex.split(hint)[1:], "--max_new_tokens=1"])
    Path("out/my run/ckpt.pt").unlink()
    before = files("out/my run")
    with pytest.raises(ConfigError, match=r"^there is out/my run/best.pt but no .*: start from it with (.*) and") as no:
        train_here(out_dir="out/my run")
    assert files("out/my run") == before
    hint = re.search("start from it with (.*) and another --out_dir", str(no.value))[1]
    train.main([*tiny(max_iters=1, out_dir="more"), *shlex.split(hint)])
    train_here(init_from="scratch", max_iters=2, out_dir="out/my run")
    assert checkpoint("out/my run/ckpt.pt")["step"] == 2


def ended(main, monkeypatch, *argv):
    """The exit status of a program that runs as in a shell."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *argv])
    with pytest.raises(SystemExit) as end:
        run(main)
    return end.value.code


def test_an_out_dir_may_have_any_name_but_be_no_file(dataset, monkeypatch, capsys):
    name = os.fsdecode(b"out\xff")  # no UTF-8
    assert ended(train.main, monkeypatch, *tiny(max_iters=1, out_dir=name)) == 0
    assert without_progress(capsys.readouterr().err) == ""
    assert Path(name, "ckpt.pt").exists()
    Path("out").write_text("")
    assert ended(train.main, monkeypatch, *tiny()) == 1
    assert re.fullmatch(r"train.py: \[Errno .*out.*\n", capsys.readouterr().err)


def test_training_goes_on_without_the_terminal(dataset):
    argv = [sys.executable, str(REPOSITORY / "train.py"), *tiny()]
    ended = subprocess.run(f"{shlex.join(argv)} >/dev/full 2>&-", shell=True, timeout=60)
    assert ended.returncode == 0
    assert checkpoint()["step"] == 4


@pytest.mark.parametrize("texts", [1, 2])
def test_a_text_that_cannot_be_shown_is_one_line(trained, capsys, monkeypatch, texts):
    """One sample, shown as it is made, and several, shown at the end."""
    capsys.readouterr()
    with open("/dev/full", "w") as full, monkeypatch.context() as disk:
        disk.setattr(sys, "stdout", full)
        assert ended(sample.main, monkeypatch, f"--num_samples={texts}", "--max_new_tokens=9") == 1
    said = r"out/best.pt, step \d, on cpu, float32\nsample.py: \[Errno 28\] No space left on device\n"
    assert re.fullmatch(said, capsys.readouterr().err)


# What a hacker may rely on


def test_a_key_of_the_model_is_two_lines(trained):
    """In a copy of the programs: n_kv_head: int | None. It trains, resumes and samples; another value is refused."""
    copy = Path("copy")
    copy.mkdir()
    for name in ("model.py", "train.py", "sample.py", "prepare.py"):
        shutil.copy(REPOSITORY / name, copy)
    shutil.copytree(REPOSITORY / "config", copy / "config")
    for name, default in (("model.py", "None"), ("train.py", 'key(None, "heads", least=1)')):
        text, n = re.subn(
            r"(?m)^    layer_norm: bool = .*$",
            rf"\g<0>\n    n_kv_head: int | None = {default}",
            (copy / name).read_text(),
        )
        assert n == 1
        (copy / name).write_text(text)
    assert "n_kv_head" not in checkpoint()["model_config"]
    program = """if True:
        import sys, torch, sample, train
        from config import ConfigError
        tiny, found = sys.argv[1:], []
        for keys in (["--max_iters=5"], ["--out_dir=two", "--n_kv_head=2", "--max_iters=1"]):
            train.main([*tiny, *keys])
        train.main(["--out_dir=two", "--max_iters=2"])
        for keys in (["--n_kv_head=1"], ["--out_dir=two", "--n_kv_head=None"]):
            try:
                train.main([*tiny, *keys])
            except ConfigError as error:
                found.append(str(error))
        sample.main(["--out_dir=two", "--max_new_tokens=3"])
        print(found, *(sample.load(out_dir)[0].config.n_kv_head for out_dir in ("two", "out")))
    """
    environment = os.environ | {"PYTHONPATH": "copy"}
    argv = [sys.executable, "-c", program, *tiny()]
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    last = ended.stdout.splitlines()[-1]
    assert "n_kv_head None -> 1" in last and "n_kv_head 2 -> None" in last
    assert last.endswith("] 2 None")


def adagrad(monkeypatch, rates, **settings):
    """torch.optim.Adagrad in the place of our optimizer; `rates` collects those that it steps at."""

    def made(model, *_):
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01, **settings)
        optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(train, "Optimizer", made)


def test_an_optimizer_of_torch_trains_at_the_scheduled_rate_and_resumes_exactly(dataset, monkeypatch):
    rates = []
    adagrad(monkeypatch, rates, weight_decay=0.1)
    train_here(out_dir="whole")
    assert rates == [learning_rate(step, config()) for step in range(4)]
    train_here(max_iters=2)
    train_here()
    for name in ("model", "optimizer"):
        assert same(checkpoint()[name], checkpoint("whole/ckpt.pt")[name])
    shutil.copytree("out", "other")
    train_here(max_iters=5, out_dir="other")
    adagrad(monkeypatch, rates)  # whose decay is that of the settings, not of the state
    train_here(max_iters=5)
    assert not same(checkpoint()["model"], checkpoint("other/ckpt.pt")["model"])
    monkeypatch.setattr(train, "Optimizer", lambda model, *_: torch.optim.AdamW(model.parameters()))
    with pytest.raises(ConfigError, match=r"\(optimizer_class 'Adagrad' -> 'AdamW'\); take another --out_dir"):
        train_here(max_iters=6)  # it would take Adagrad's state, and fail in its first step


def test_a_checkpoint_that_does_not_name_its_optimizer_says_how_to_use_its_weights(trained):
    """As older ones, whose moments were stored otherwise, and a best.pt in the place of ckpt.pt."""
    older = checkpoint()
    del older["optimizer"]["class"]
    for content in (older, checkpoint("out/best.pt")):
        torch.save(content, "out/ckpt.pt")
        with pytest.raises(ConfigError, match=r"\(optimizer_class 'unknown' .*--init_from=out/ckpt.pt fine-tunes"):
            train_here(max_iters=6)


def test_a_metric_in_the_row_is_a_column_and_older_rows_stay(trained, monkeypatch):
    *before, _ = rows()  # the evaluation of step 4 is repeated
    with monkeypatch.context() as changed:
        changed.setattr(train, "evaluate", lambda *given, f=train.evaluate: f(*given) | {"accuracy": 0.5})
        extra = {"z_loss": torch.tensor(0.25)}  # of a step, a tensor on the device
        changed.setattr(train, "train_step", lambda *given, f=train.train_step: f(*given) | extra)
        train_here(max_iters=6)
    assert Path("out/log.csv").read_text().startswith(",".join(train.Log.COLUMNS) + ",accuracy,z_loss\n")
    assert rows()[: len(before)] == [row | {"accuracy": "", "z_loss": ""} for row in before]
    assert [row["step"] for row in rows() if row["accuracy"] == "0.5"] == ["4", "6"]
    assert [row["step"] for row in rows() if row["z_loss"] == "0.25"] == ["5", "6"]
    *before, _ = rows()
    train_here(max_iters=8)  # without it
    assert rows()[: len(before)] == before
    assert rows()[-1]["accuracy"] == ""


def test_weights_and_biases_is_a_line_of_a_recipe(dataset, monkeypatch):
    """As the comment in gpt2_124m.py has it: init comes before the writer that it follows, in process 0 alone."""
    too_late = "assert 'torch.utils.tensorboard' not in sys.modules"  # it patches SummaryWriter when that is made
    Path("wandb.py").write_text(f"import sys\ndef init(**keys):\n    {too_late}\n    print('wandb', keys)")
    lines = re.findall(r"^#     (.*(?:wandb|tensorboard).*)", (REPOSITORY / "config/gpt2_124m.py").read_text(), re.M)
    Path("recipe.py").write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": f".:{REPOSITORY}"}
    program = "import sys, train; train.main(sys.argv[1:])"
    argv = [sys.executable, "-c", program, "recipe.py", *tiny(max_iters=1)]
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert re.match("wandb {.*sync_tensorboard", ended.stdout)
    assert list(Path("out").glob("events.out.tfevents.*"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: pytest.fail("not in process 0")))
    assert train.read(TrainConfig, ["recipe.py"]).tensorboard
