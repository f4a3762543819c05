import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    REPOSITORY,
    STOPPING,
    TINY,
    checkpoint,
    command,
    losses,
    reports,
    rows,
    same,
    signal_in_step,
    tiny,
    train_here,
    without_progress,
)
from tensorboard.backend.event_processing import event_accumulator

import prepare
import sample
import train
from config import ConfigError, UserError, run
from model import GPT, Bigram, GPTConfig, choose_device, choose_dtype, peak_flops, training_dtype
from prepare import load_meta
from train import Optimizer, Process, Tokens, TrainConfig, batch, learning_rate, mean_loss

ALONE = Process(0, 1, torch.device("cpu"), torch.float32)


def config(**changes):
    return TrainConfig(**TINY | changes)


def metrics(loss, grad_norm):
    """What a step returns."""
    return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(grad_norm)}


def tokens(split="train", **changes):
    return Tokens("shakespeare_char", split, load_meta("shakespeare_char"), config(**changes).block_size)


# The schedule


def test_learning_rate_warms_up_linearly_and_decays_by_a_cosine():
    schedule = config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    assert learning_rate(0, schedule) == pytest.approx(0.1)
    assert learning_rate(4, schedule) == pytest.approx(0.5)
    assert learning_rate(9, schedule) == pytest.approx(1.0)
    assert learning_rate(10, schedule) == pytest.approx(1.0)
    assert learning_rate(35, schedule) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(60, schedule) == pytest.approx(0.55)
    assert learning_rate(110, schedule) == pytest.approx(0.1)
    assert learning_rate(500, schedule) == pytest.approx(0.1)


def test_lr_decay_iters_ends_the_decay_and_decay_lr_turns_it_off():
    early = config(learning_rate=1.0, min_lr=0.1, warmup_iters=0, max_iters=100, lr_decay_iters=50)
    assert learning_rate(25, early) == pytest.approx(0.55)
    assert learning_rate(50, early) == learning_rate(99, early) == pytest.approx(0.1)
    constant = config(learning_rate=1.0, warmup_iters=4, decay_lr=False)
    assert [learning_rate(step, constant) for step in (0, 3, 4, 19)] == [0.25, 1.0, 1.0, 1.0]


def test_the_run_uses_the_schedule(dataset):
    train_here(log_interval=1, max_iters=12)
    logged = [float(row["lr"]) for row in rows() if row["lr"]]
    assert logged == pytest.approx([learning_rate(step, config(max_iters=12)) for step in range(12)], rel=1e-6)


# Data


def test_a_batch_depends_on_seed_and_step_alone(dataset):
    data = tokens()
    x, y = batch(data, 3, 0, config(), ALONE)
    assert x.shape == y.shape == (8, 16)
    assert torch.equal(batch(data, 3, 0, config(), ALONE)[0], x)
    assert not torch.equal(batch(data, 4, 0, config(), ALONE)[0], x)
    assert not torch.equal(batch(data, 3, 0, config(seed=1), ALONE)[0], x)
    # Nor is one seed another one, shifted by some steps.
    assert not torch.equal(batch(data, 1, 0, config(seed=1), ALONE)[0], batch(data, 0, 0, config(seed=2), ALONE)[0])


def test_every_start_of_the_text_is_drawn_from_the_first_to_the_last(dataset):
    np.arange(50, dtype="<u2").tofile(dataset / "train.bin")
    data = Tokens("shakespeare_char", "train", {"vocab_size": 50}, 16)
    drawn = torch.cat([batch(data, step, 0, config(), ALONE)[0][:, 0] for step in range(200)])
    assert set(drawn.tolist()) == set(range(50 - 16))


@pytest.mark.parametrize("shares", [2, 3, 6])
def test_the_step_of_a_divided_batch_is_that_of_the_whole(dataset, shares):
    for n in (1, shares):
        settings = {"batch_size": 6, "dropout": 0.0, "max_iters": 1, "learning_rate": 1e-4, "min_lr": 0}
        train_here(**settings, gradient_accumulation_steps=n, optimizer="muon", warmup_iters=0, out_dir=f"out/{n}")
    whole, divided = (checkpoint(f"out/{n}/ckpt.pt")["model"] for n in (1, shares))
    torch.testing.assert_close(divided, whole, rtol=0, atol=9e-7)
    norms = [float(reports(f"out/{n}/log.csv")[-1]["grad_norm"]) for n in (1, shares)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_targets_are_the_inputs_shifted_by_one_and_come_from_the_split(dataset):
    data = tokens()
    x, y = batch(data, 0, 0, config(), ALONE)
    assert torch.equal(x[:, 1:], y[:, :-1])
    text = np.fromfile(dataset / "train.bin", "<u2").tobytes()
    for row, target in zip(x, y, strict=True):
        assert torch.cat((row, target[-1:])).numpy().astype("<u2").tobytes() in text


@pytest.mark.parametrize(("world_size", "shares"), [(1, 4), (2, 1), (2, 2), (4, 2)])
def test_processes_and_micro_batches_divide_the_same_batch_among_them(dataset, world_size, shares):
    data = tokens()
    whole = batch(data, 5, 0, config(), ALONE)[0]
    divided = config(gradient_accumulation_steps=shares)
    parts = [
        batch(data, 5, share, divided, Process(rank, world_size, torch.device("cpu"), torch.float32))[0]
        for rank in range(world_size)
        for share in range(shares)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_every_place_of_the_split_is_drawn(dataset):
    short = np.arange(18, dtype="<u2")  # two blocks of 16 and a target fit into 18 tokens
    short.tofile(dataset / "train.bin")
    meta = load_meta("shakespeare_char") | {"train_tokens": 18}
    data = Tokens("shakespeare_char", "train", meta, 16)
    first = {row[0].item() for step in range(20) for row in batch(data, step, 0, config(), ALONE)[0]}
    assert first == {0, 1}


def test_token_ids_above_32767_are_read_as_they_are(dataset):
    ids = np.arange(65536, dtype="<u2")
    ids.tofile(dataset / "train.bin")
    data = Tokens("shakespeare_char", "train", {"vocab_size": 65536}, 16)
    assert data.blocks(np.array([65500]), 16).tolist() == [list(range(65500, 65517))]


def test_a_token_outside_the_vocabulary_is_refused(dataset):
    ids = np.fromfile(dataset / "val.bin", "<u2")
    ids[40] = first_unknown = load_meta("shakespeare_char")["vocab_size"]
    ids.tofile(dataset / "val.bin")
    with pytest.raises(
        OSError,
        match=rf"data/shakespeare_char/val.bin has token id {first_unknown}; the vocabulary has",
    ):
        train_here()


def test_a_split_shorter_than_a_block_is_refused(dataset):
    with pytest.raises(UserError, match=r"val\.bin has 2000 tokens, too few for block_size 2000"):
        train_here(block_size=2000)
    train_here(block_size=1999, max_iters=1, batch_size=1)


def test_missing_data_are_prepared_first(folder, capsys):
    path = folder / "data" / "shakespeare_char" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_text("To be, or not to be. " * 500)
    train_here()
    assert "9,450 train tokens" in capsys.readouterr().out
    assert load_meta("shakespeare_char")["train_tokens"] == 9450


@pytest.mark.parametrize("seconds", [30, 90])
def test_a_text_edited_after_it_was_prepared_is_told_with_the_command_that_prepares_it(dataset, capsys, seconds):
    """A copied folder, whose files may be as new as the copy, was not edited."""
    text, meta = dataset / "input.txt", dataset / "meta.json"
    text.write_text(text.read_text() * 2)
    edited = text.stat().st_mtime
    os.utime(meta, (edited - seconds, edited - seconds))
    before = (dataset / "train.bin").read_bytes()
    train_here(max_iters=1)
    out = capsys.readouterr().out
    found = re.findall("input.txt is newer than its tokens.*: python prepare.py (.*) prepares it again", out)
    assert (dataset / "train.bin").read_bytes() == before
    again = ["--dataset=shakespeare_char", "--tokenizer=data/shakespeare_char/meta.json"]
    assert found == [" ".join(again)] * (seconds > 60)
    prepare.main(again)
    train_here(max_iters=1, init_from="scratch")
    assert load_meta("shakespeare_char")["train_tokens"] == len(before)
    assert "is newer" not in capsys.readouterr().out


# Optimizer


def test_weight_decay_is_on_matrices_only():
    model = GPT(config(bias=True).model_config(11))
    decayed, others = Optimizer(model, config()).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("keys", [{}, {"beta1": 0.5, "beta2": 0.7, "weight_decay": 3.0}])
def test_a_step_is_adamws_step_on_the_clipped_gradient_of_the_batch(dataset, keys):
    """The first two steps, written out for every weight from the paper's formulas."""
    settings = config(dropout=0.0, grad_clip=0.05, max_iters=2, log_interval=1, init_from="scratch", **keys)
    beta1, beta2, decay = settings.beta1, settings.beta2, settings.weight_decay
    meta = load_meta("shakespeare_char")
    torch.manual_seed(settings.seed)
    model = GPT(settings.model_config(meta["vocab_size"]))
    weights = list(model.parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(2):
        model(*batch(tokens(), step, 0, settings, ALONE))[1].backward()
        norm = torch.sqrt(sum((w.grad**2).sum() for w in weights))
        assert norm > 0.05
        lr = learning_rate(step, settings)
        for w, m, v in zip(weights, first, second, strict=True):
            g = w.grad * 0.05 / norm
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g**2)
            move = (m / (1 - beta1 ** (step + 1))) / (torch.sqrt(v / (1 - beta2 ** (step + 1))) + 1e-8)
            w.data -= lr * (move + decay * w.data * (w.dim() == 2))
            w.grad = None
    train_here(dropout=0.0, grad_clip=0.05, max_iters=2, log_interval=1, **keys)
    for name, tensor in checkpoint()["model"].items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert float(reports()[-1]["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)


def test_grad_clip_0_turns_clipping_off(dataset):
    for grad_clip in (0, 1e9, 1e-3):
        train_here(grad_clip=grad_clip, out_dir=f"out/{grad_clip}", max_iters=2, log_interval=1)
    unclipped, loose, tight = (checkpoint(f"out/{grad_clip}/ckpt.pt")["model"] for grad_clip in (0, 1e9, 1e-3))
    assert same(unclipped, loose)
    assert not same(unclipped, tight)
    assert float(reports("out/0/log.csv")[-1]["grad_norm"]) > 1e-2


def test_the_seed_is_that_of_the_initial_weights_too(dataset, monkeypatch):
    monkeypatch.setattr(train.StopSignals, "received", signal.SIGTERM)  # before the first step
    for seed, out_dir in ((1, "a"), (1, "b"), (2, "c")):
        torch.manual_seed(0)
        train_here(seed=seed, out_dir=out_dir)
    one, again, other = (checkpoint(f"{out_dir}/ckpt.pt")["model"] for out_dir in "abc")
    assert same(one, again)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def in_a_block(*shapes, names="abc"):
    """A module whose parameters have the names of a block's."""
    torch.manual_seed(0)
    block = torch.nn.ParameterDict({name: torch.randn(shape) for name, shape in zip(names, shapes, strict=False)})
    return torch.nn.ModuleDict({"transformer": torch.nn.ModuleDict({"h": block})})


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (32, 32)])
def test_muon_takes_the_step_of_torchs_own(shape, dtype):
    model = in_a_block(shape, shape, shape[:1])  # two matrices, which step together, and a vector
    matrix, other, vector = model.parameters()
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    ours = Optimizer(model, config(optimizer="muon", weight_decay=0.1, beta2=0.999), dtype)
    set_rate(ours, 0.01)
    muon = torch.optim.Muon(copies[:2], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")  # Liu et al.'s scale
    theirs = [muon, torch.optim.AdamW(copies[2:], lr=0.01, weight_decay=0.0)]
    before = matrix.detach().clone()
    for _ in range(3):
        for parameter, copy in zip((matrix, other, vector), copies, strict=True):
            parameter.grad = torch.randn_like(parameter)
            copy.grad = parameter.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    torch.testing.assert_close(vector, copies[2])
    torch.testing.assert_close([matrix, other], copies[:2], rtol=0, atol=0.002)
    assert (matrix - before).abs().mean() > 0.001


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_muons_step_is_that_of_its_formulas_in_float64(shape):
    """Momentum, Nesterov's look ahead, five iterations and the scale, written out for one matrix after the other."""
    model = in_a_block(shape, shape).double()
    optimizer = Optimizer(model, config(optimizer="muon", weight_decay=0.3), torch.float64)
    expected = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in expected]
    for lr in (0.1, 0.05):
        set_rate(optimizer, lr)
        for p, w, m in zip(model.parameters(), expected, momenta, strict=True):
            p.grad = torch.randn_like(p)
            m.copy_(0.95 * m + 0.05 * p.grad)
            x = 0.95 * m + 0.05 * p.grad
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            w.copy_(w - lr * 0.3 * w - lr * 0.2 * max(shape) ** 0.5 * x)
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected, rtol=1e-5, atol=1e-6)


def test_muon_leaves_a_matrix_without_gradient_where_it_is(dataset, monkeypatch):
    """Nothing of attention reaches the loss while c_proj is zero."""

    def silent(model, state, *rest, original=train.train_step):
        attention = state.model.transformer.h[0].attn
        attention.c_proj.weight.data.zero_()
        before.append(attention.c_attn.weight.clone())
        return original(model, state, *rest)

    before = []
    monkeypatch.setattr(train, "train_step", silent)
    train_here(optimizer="muon", weight_decay=0, max_iters=1)
    assert same(checkpoint()["model"]["transformer.h.0.attn.c_attn.weight"], before[0].detach())


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = GPT(config(bias=True).model_config(11))
    settings = config(optimizer="muon", beta1=0.8, beta2=0.9, weight_decay=0.3)  # none of them the default
    optimizer = Optimizer(model, settings)
    matrices, (embeddings, vectors) = (
        [group for group in optimizer.param_groups if (group["update"] == optimizer.muon) == by_muon]
        for by_muon in (True, False)
    )
    assert {id(p) for g in matrices for p in g["params"]} == {
        id(p) for p in model.transformer.h.parameters() if p.dim() == 2
    }
    assert {id(p) for p in embeddings["params"]} == {id(model.transformer.wte.weight), id(model.transformer.wpe.weight)}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert [g["weight_decay"] for g in (*matrices, embeddings, vectors)] == [0.3] * 4 + [0.3, 0.0]


def test_muon_computes_in_the_dtype_of_the_run_but_for_float16():
    model = GPT(config().model_config(11))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    found = [Optimizer(model, config(optimizer="muon"), dtype).dtype for dtype in dtypes]
    assert found == [torch.float32, torch.bfloat16, torch.float32]


def test_a_run_keeps_its_optimizer_and_its_rate(dataset, capsys, monkeypatch):
    """What is not given follows the checkpoint, not the defaults, which are another optimizer's."""
    train_here(max_iters=10, learning_rate=2e-3, weight_decay=0.2)
    shutil.copytree("out", "other")
    train_here(max_iters=14, learning_rate=2e-3, weight_decay=0.2, out_dir="other")
    for name in ("optimizer", "learning_rate", "min_lr", "weight_decay"):
        monkeypatch.delitem(TINY, name)
    capsys.readouterr()
    train_here(max_iters=14)
    kept = "optimizer 'adamw', learning_rate 0.002, min_lr 0.0001, weight_decay 0.2"
    assert f"changed since: max_iters 10 -> 14; as in the checkpoint: {kept}\n" in capsys.readouterr().out
    assert same(checkpoint()["model"], checkpoint("other/ckpt.pt")["model"])
    assert {"optimizer": "adamw", "learning_rate": 2e-3}.items() <= checkpoint()["config"].items()
    Path("recipe.py").write_text("optimizer = 'muon'; learning_rate = 0.01; min_lr = 0.0")
    with pytest.raises(ConfigError, match=r"\(optimizer 'adamw' -> 'muon'\); take another --out_dir"):
        train.main(["recipe.py", *tiny(max_iters=16)])
    train_here(max_iters=15)
    assert {"optimizer": "adamw", "learning_rate": 2e-3}.items() <= checkpoint()["config"].items()
    train_here(optimizer="adamw", learning_rate=1e-3, max_iters=16)  # what is given counts
    expected = learning_rate(15, config(max_iters=16, learning_rate=1e-3, min_lr=1e-4))
    assert float(reports()[-1]["lr"]) == pytest.approx(expected, rel=1e-6)
    torch.save(checkpoint() | {"config": checkpoint()["config"] | {"weight_decay": "x"}}, "out/ckpt.pt")
    with pytest.raises(UserError, match=r"^out/ckpt.pt: weight_decay must be a number, at least 0, found 'x'$"):
        train_here(max_iters=18)


def test_the_bigram_table_trains_with_muon_too(dataset):
    """It has no block: AdamW takes all of it."""
    train_here(model="bigram", optimizer="muon", out_dir="muon")
    train_here(model="bigram")
    torch.testing.assert_close(checkpoint("muon/ckpt.pt")["model"], checkpoint()["model"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_a_scaler_a_step_that_overflows_changes_no_parameter(optimizer):
    model = GPT(config().model_config(11))
    optimizer, scaler = Optimizer(model, config(optimizer=optimizer)), torch.amp.GradScaler("cpu", init_scale=4.0)
    set_rate(optimizer, 1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for bad in (math.inf, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.transformer.wte.weight.grad[0, 0] = bad
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert same(before, model.state_dict()) == (bad == math.inf)
    assert scaler.get_scale() == 2.0


def test_accumulation_changes_memory_not_learning(dataset):
    found = []
    for shares in (1, 4):
        train_here(
            dropout=0.0, gradient_accumulation_steps=shares, out_dir=f"out/{shares}", log_interval=1, max_iters=40
        )
        found.append([float(row["loss"]) for row in rows(f"out/{shares}/log.csv") if row["lr"]])
    assert len(found[0]) == 40
    assert found[0] == pytest.approx(found[1], abs=2e-4)
    assert found[0][-1] < found[0][0] - 0.2


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
        state = train.State(GPT(settings.model_config(65)), None, torch.amp.GradScaler(enabled=False), {})
        state.optimizer = Optimizer(state.model, settings)
        model = train.compiled_and_parallel(state.model, settings, process)
        for state.step in range(4):
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


def test_where_cuda_graphs_do_not_work_one_line_says_so(gpus, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("torch.cuda.make_graphed_callables", fails)
    model = GPT(config().model_config(65))
    process = Process(0, 1, torch.device("cuda"), torch.bfloat16)
    assert train.compiled_and_parallel(model, config(), process) is model
    assert capsys.readouterr().out == "a CUDA graph does not work here (RuntimeError): training without it\n"


def test_the_end_of_a_run_says_what_it_cost(dataset, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**30)
    state = train.State(GPT(config().model_config(5)), None, None, {})
    for device, cost in (("cpu", "0 s"), ("cuda", "0 s and at most 3.0 GiB of GPU memory")):
        assert train.Log(config(), state, Process(0, 1, torch.device(device), torch.bfloat16)).cost() == cost


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_learns_the_same(dataset):
    for compiled in (False, True):
        short = {"max_iters": 4, "log_interval": 1, "dropout": 0.0, "n_layer": 1, "feed_forward": False}
        train_here(**short, compile=compiled, out_dir=f"out/{compiled}")
    plain, fused = ([float(row["loss"]) for row in reports(f"out/{c}/log.csv")] for c in (False, True))
    assert fused == pytest.approx(plain, abs=1e-4)
    assert not any("_orig_mod" in name for name in checkpoint("out/True/ckpt.pt")["model"])


def test_where_no_compiler_works_one_line_says_so_and_the_run_goes_on(dataset, monkeypatch, capsys):
    monkeypatch.setattr("torch.compile", lambda function: lambda *_: 1 / 0)  # as with CXX=/nowhere, at the first call
    train_here(compile=True, max_iters=2)
    assert "torch.compile does not work here (ZeroDivisionError): training without it\n" in capsys.readouterr().out
    assert checkpoint()["step"] == 2


def test_a_compiler_that_loses_gradients_is_not_used(dataset, monkeypatch, capsys):
    """As torch 2.6's does on a CPU, where two tokens are the same."""

    def halved(function):
        return lambda *given: 0.5 * (result := function(*given)) + 0.5 * result.detach()

    monkeypatch.setattr("torch.compile", halved)
    train_here(compile=True, max_iters=2)
    assert "torch.compile does not work here (ArithmeticError): training without it\n" in capsys.readouterr().out
    assert checkpoint()["step"] == 2


def test_bfloat16_training_learns_nearly_the_same(dataset):
    for dtype in ("float32", "bfloat16"):
        train_here(dtype=dtype, out_dir=f"out/{dtype}", max_iters=40)
    plain, rounded = (float(rows(f"out/{dtype}/log.csv")[-1]["val_loss"]) for dtype in ("float32", "bfloat16"))
    assert rounded != plain
    assert rounded == pytest.approx(plain, abs=0.02)
    assert {tensor.dtype for tensor in checkpoint("out/bfloat16/ckpt.pt")["model"].values()} == {torch.float32}


def step_loss(data, step=0, rank=0, world_size=2, **changes):
    """The loss of one step, taken by one process of two, before the gradients meet."""
    settings = config(dropout=0.5, batch_size=4, grad_clip=0, **changes)
    process = Process(rank, world_size, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    model = GPT(settings.model_config(data.vocab_size))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = train.State(model, Optimizer(model, settings), scaler, {}, step=step)
    state.model.no_sync = contextlib.nullcontext
    return train.train_step(model, state, data, settings, process)["loss"].item()


def test_dropout_of_a_step_depends_on_seed_step_rank_and_micro_batch(dataset):
    np.zeros(100, "<u2").tofile(dataset / "train.bin")  # all batches are alike: only dropout tells steps apart
    data = Tokens("shakespeare_char", "train", {"vocab_size": 5}, 16)
    alike = step_loss(data)
    assert step_loss(data) == alike
    assert step_loss(data, step=1) != alike
    assert step_loss(data, rank=1) != alike
    assert step_loss(data, seed=1) != alike
    assert step_loss(data, gradient_accumulation_steps=2) != alike


def test_every_seed_step_rank_and_micro_batch_has_a_dropout_of_its_own(dataset, monkeypatch):
    """None is that of another one, as it would be if the four were added up."""
    np.zeros(100, "<u2").tofile(dataset / "train.bin")
    data = Tokens("shakespeare_char", "train", {"vocab_size": 5}, 16)
    found, forward = [], GPT.forward

    def noted(*inputs, **key):
        logits, loss = forward(*inputs, **key)
        found.append(loss.item())
        return logits, loss

    monkeypatch.setattr(GPT, "forward", noted)
    for seed, step, rank in itertools.product(range(2), repeat=3):
        step_loss(data, step, rank, seed=seed, gradient_accumulation_steps=2)
    assert len(found) == len(set(found)) == 2**4


def test_a_float16_scaler_is_saved_and_resumed_and_skips_what_overflows(dataset, monkeypatch):
    def with_scaler(*arguments, original=train.start):
        state, *others = original(*arguments)
        scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**20, growth_interval=6)
        path = dataset.parent.parent / "out" / "ckpt.pt"
        if path.exists():
            scaler.load_state_dict(checkpoint()["scaler"])
        state.scaler = scaler
        return state, *others

    train_here(out_dir="plain", dropout=0.0)
    monkeypatch.setattr(train, "start", with_scaler)
    train_here(dropout=0.0)
    assert checkpoint()["scaler"]["scale"] == 2.0**23  # grown three times in 20 steps
    for name, tensor in checkpoint("plain/ckpt.pt")["model"].items():
        torch.testing.assert_close(checkpoint()["model"][name], tensor, rtol=1e-3, atol=1e-5)


def with_scaler_of(monkeypatch, init_scale):
    """As on a GPU in float16: the gradients are scaled, first by `init_scale`; those that overflow are skipped."""

    def scaled(*given, original=torch.amp.GradScaler, **_):
        return original("cpu", init_scale=init_scale)

    monkeypatch.setattr("torch.amp.GradScaler", scaled)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_stopped_while_all_gradients_overflow_resumes(dataset, monkeypatch, optimizer):
    settings = {"optimizer": optimizer, "log_interval": 1, "eval_interval": 100}
    with_scaler_of(monkeypatch, 2.0**127)
    train_here(**settings, max_iters=1, lr_decay_iters=20)
    assert checkpoint()["scaler"]["scale"] == 2.0**126
    assert rows()[1]["grad_norm"] in ("inf", "nan")
    train_here(**settings)
    train_here(**settings, out_dir="whole")
    assert same(checkpoint()["model"], checkpoint("whole/ckpt.pt")["model"])
    assert float(reports()[-1]["grad_norm"]) < 100


def test_a_run_whose_gradients_never_become_finite_ends(dataset, monkeypatch):
    def overflowing(model, state, *rest, original=train.train_step):
        state.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
        return original(model, state, *rest)

    monkeypatch.setattr(train, "train_step", overflowing)
    with_scaler_of(monkeypatch, 8.0)
    with pytest.raises(UserError, match=r"^loss is \S+, gradient norm \w+ with the loss scaled by 0.5 at step 4, "):
        train_here(log_interval=1)
    assert checkpoint()["step"] == 0


def test_a_run_may_change_its_number_type(dataset):
    train_here(max_iters=10)
    assert checkpoint()["scaler"] == {}
    train_here(max_iters=20, dtype="bfloat16")
    assert checkpoint()["step"] == 20


# Evaluation


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("n_tokens", [1999, 1600, 100, 15, 1])
def test_evaluation_is_the_mean_over_the_tokens_of_the_first_blocks_or_of_spread_ones(dataset, n_tokens, spread):
    torch.manual_seed(0)
    data = tokens("val")
    model = GPT(config(dropout=0.5).model_config(data.vocab_size))
    ids = torch.from_numpy(np.fromfile(dataset / "val.bin", "<u2").astype(np.int64))
    total = 0.0
    model.eval()
    for first in range(0, n_tokens, 16):
        start = first * 1999 // n_tokens if spread else first
        end = start + min(16, n_tokens - first)
        logits = model(ids[None, start:end])[0].detach()
        total -= logits.log_softmax(-1)[0, range(end - start), ids[start + 1 : end + 1]].sum().item()
    model.train()
    assert mean_loss(model, data, n_tokens, config(), ALONE, spread) == pytest.approx(total / n_tokens, rel=1e-5)
    assert model.training


def test_an_evaluation_keeps_no_graph_for_a_backward_pass(dataset, monkeypatch):
    """Or a long one would run out of memory."""
    found, hidden = set(), GPT.hidden

    def noted(self, *inputs):
        found.add((self.training, torch.is_grad_enabled()))
        return hidden(self, *inputs)

    monkeypatch.setattr(GPT, "hidden", noted)
    train_here(max_iters=2)
    assert found == {(True, True), (False, False)}


def test_the_last_evaluation_of_a_run_is_of_the_whole_validation_split(dataset, capsys):
    train_here(eval_iters=0)
    data = tokens("val")
    model = GPT(config().model_config(data.vocab_size))
    model.load_state_dict(checkpoint()["model"])
    assert losses(capsys.readouterr().out)[20][1] == pytest.approx(
        mean_loss(model, data, 1999, config(), ALONE), abs=1e-4
    )


def test_the_train_loss_is_of_the_whole_split_however_easy_its_beginning(dataset, capsys):
    ids = np.fromfile(dataset / "train.bin", "<u2")
    ids[: len(ids) // 4] = 0
    ids.tofile(dataset / "train.bin")
    train_here(eval_iters=2)
    train_loss, val_loss = losses(capsys.readouterr().out)[20]
    assert 0.6 * val_loss < train_loss < val_loss  # of the first tokens alone it would be near 0


def test_eval_iters_reads_the_first_batches(dataset, capsys):
    ids = np.fromfile(dataset / "val.bin", "<u2")
    train_here(eval_iters=3, out_dir="out/a")
    ids[3 * 8 * 16 + 1 :] = 0  # what three batches of 8 x 16 tokens do not reach
    ids.tofile(dataset / "val.bin")
    train_here(eval_iters=3, out_dir="out/b")
    assert [row["val_loss"] for row in rows("out/a/log.csv")] == [row["val_loss"] for row in rows("out/b/log.csv")]


def test_bits_per_byte_compare_tokenizers(folder, capsys):
    text = "Wär ich ein Vöglein, flög ich zu dir. " * 300
    Path("mine.txt").write_text(text)
    for tokenizer in ("char", "bpe"):
        prepare.main([f"--dataset={tokenizer}", "--input=mine.txt", f"--tokenizer={tokenizer}"])
        train_here(dataset=tokenizer, out_dir=f"{tokenizer} start", max_iters=1, eval_iters=1, batch_size=1)
        assert "bits per byte" not in capsys.readouterr().out  # of a part of the split: its bytes are not known
        train_here(dataset=tokenizer, out_dir=tokenizer, max_iters=1, eval_iters=0)
        out = capsys.readouterr().out
        meta = prepare.load_meta(tokenizer)
        ids = np.fromfile(f"data/{tokenizer}/val.bin", "<u2")
        n_bytes = len(prepare.tokenizer_of(meta).decode(ids).encode())
        bits = losses(out)[1][1] / math.log(2) * len(ids) / n_bytes
        [said] = re.findall(r"^step 1: .*, val loss [\d.]+, ([\d.]+) bits per byte$", out, re.MULTILINE)
        assert float(said) == pytest.approx(bits, abs=0.006)
        assert float(rows(f"{tokenizer}/log.csv")[-1]["bits_per_byte"]) == pytest.approx(bits, abs=2e-4)


def test_an_evaluation_that_is_repeated_replaces_its_row_alone(dataset):
    train_here(max_iters=10, eval_iters=0)
    *before, repeated = rows()
    assert repeated["bits_per_byte"]
    train_here(max_iters=11, eval_iters=1)
    assert rows()[: len(before)] == before
    [row] = (row for row in rows()[len(before) :] if row["step"] == "10")
    assert row["val_loss"] != repeated["val_loss"]
    assert row["bits_per_byte"] == ""  # of a part of the split


def test_eval_only_evaluates_and_writes_nothing(dataset, capsys):
    train_here()
    before = {path.name: path.read_bytes() for path in (dataset.parent.parent / "out").iterdir()}
    expected = losses(capsys.readouterr().out)[20]
    train_here(eval_only=True)
    assert losses(capsys.readouterr().out) == {20: expected}
    assert {path.name: path.read_bytes() for path in (dataset.parent.parent / "out").iterdir()} == before
    train_here(eval_only=True, out_dir="out/new")
    assert not (dataset.parent.parent / "out" / "new").exists()
    out = capsys.readouterr().out
    assert "best validation loss" not in out
    assert set(losses(out)) == {0}


# Checkpoints


def test_checkpoints_have_the_promised_content(dataset):
    train_here()
    whole, best = checkpoint(), checkpoint("out/best.pt")
    common = {"format", "model", "model_config", "step", "config", "tokenizer", "sha256", "train_tokens"}
    common |= {"best_val_loss", "best_step"}
    assert set(whole) == common | {"optimizer", "scaler"}
    assert set(best) == common
    assert whole["format"] == 1
    assert whole["step"] == 20
    assert whole["config"] == dataclasses.asdict(config())
    assert whole["tokenizer"]["chars"] == json.loads((dataset / "meta.json").read_text())["chars"]
    assert all(tensor.dtype == torch.float32 for tensor in whole["model"].values())
    assert set(whole["model"]) == set(GPT(config().model_config(5)).state_dict())
    assert whole["best_val_loss"] == best["best_val_loss"]


def test_best_is_the_checkpoint_of_the_lowest_validation_loss(dataset, capsys):
    train_here(max_iters=40, eval_interval=5)
    train_here(max_iters=60, learning_rate=3.0, decay_lr=False, eval_interval=5)  # wild on purpose
    found = losses(capsys.readouterr().out)
    step = min(found, key=lambda step: found[step][1])
    assert step != 60
    best = checkpoint("out/best.pt")
    assert best["step"] == step
    assert best["best_val_loss"] == pytest.approx(found[step][1], abs=1e-4)


@pytest.mark.parametrize("changes", [{"eval_iters": 0}, {"batch_size": 4}, {"eval_iters": 1}])
def test_where_what_is_evaluated_has_changed_the_best_starts_over(dataset, capsys, changes):
    """best.pt stays until there is another one."""
    wild = {"learning_rate": 1.0, "min_lr": 0, "weight_decay": 0, "warmup_iters": 20, "eval_iters": 2}  # best at 10
    train_here(**wild)
    before = Path("out/best.pt").read_bytes()
    assert checkpoint("out/best.pt")["step"] == 10
    with pytest.MonkeyPatch.context() as stopped:
        signal_in_step(stopped, signal.SIGTERM, last=20)
        stopped.setattr(train, "evaluate", lambda *_: {"train_loss": 1.0, "val_loss": math.nan})
        train.main(tiny(**wild | changes, max_iters=30))
    assert "the lowest loss starts over\n" in capsys.readouterr().out
    assert Path("out/best.pt").read_bytes() == before
    train_here(**wild | changes, max_iters=30)
    assert "starts over" not in capsys.readouterr().out  # once
    assert checkpoint("out/best.pt")["step"] == checkpoint()["best_step"] >= 20
    train_here(**wild | changes | {"batch_size": 8}, max_iters=31)
    assert ("starts over" in capsys.readouterr().out) == (changes == {"batch_size": 4})


def test_where_the_whole_split_is_evaluated_the_best_outlives_another_batch_size(dataset, capsys):
    wild = {"learning_rate": 1.0, "min_lr": 0, "weight_decay": 0, "warmup_iters": 20, "eval_iters": 0}  # best at 10
    train_here(**wild)
    before = Path("out/best.pt").read_bytes()
    train_here(**wild, batch_size=4, max_iters=21)
    assert "starts over" not in capsys.readouterr().out
    assert checkpoint()["best_step"] == checkpoint("out/best.pt")["step"] == 10
    assert Path("out/best.pt").read_bytes() == before


@pytest.mark.parametrize("eval_iters", [0, 2])
def test_a_best_model_that_is_gone_is_no_bar_to_the_next(dataset, eval_iters):
    train_here(eval_iters=2)
    Path("out/best.pt").unlink()
    train_here(eval_iters=eval_iters, max_iters=30, learning_rate=3.0)  # the rate makes it worse
    assert checkpoint("out/best.pt")["best_val_loss"] == checkpoint()["best_val_loss"]
    assert checkpoint("out/best.pt")["step"] == checkpoint()["best_step"] == 20


@pytest.mark.parametrize(
    ("dtype", "optimizer", "threads"),
    [("float32", "adamw", 1), ("bfloat16", "adamw", 1), ("bfloat16", "muon", 1), ("float32", "adamw", 2)],
)
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(
    dataset, capsys, dtype, optimizer, threads, monkeypatch, request
):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    settings = {"dtype": dtype, "optimizer": optimizer, "max_iters": 30}
    settings |= {"n_embd": 128, "batch_size": 32, "eval_iters": 1} if threads > 1 else {}  # enough work to be shared
    train_here(**settings, out_dir="whole")
    expected = losses(capsys.readouterr().out)

    class CrashError(Exception):
        pass

    def crashing(*arguments, original=train.train_step):
        if arguments[1].step == 17:
            raise CrashError
        return original(*arguments)

    monkeypatch.setattr(train, "train_step", crashing)
    with pytest.raises(CrashError):
        train_here(**settings)
    monkeypatch.undo()
    monkeypatch.chdir(dataset.parent.parent)
    torch.manual_seed(999)  # nothing may depend on what the process did before
    found = losses(capsys.readouterr().out)
    train_here(**settings)
    output = capsys.readouterr().out
    assert "resuming from out/ckpt.pt at step 10\n" in output
    assert found | losses(output) == expected
    whole, resumed = checkpoint("whole/ckpt.pt"), checkpoint()
    whole["config"]["out_dir"] = "out"
    assert same(whole, resumed)
    timing = {"seconds": None, "tokens_per_second": None}
    assert [row | timing for row in rows()] == [row | timing for row in rows("whole/log.csv")]
    seconds = [float(row["seconds"]) for row in rows()]
    assert seconds == sorted(seconds)


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


def test_keys_are_compared_when_those_that_are_not_given_have_followed_the_checkpoint(dataset, monkeypatch):
    """A min_lr that is above the default learning_rate, but not above the run's."""
    train_here(max_iters=1, learning_rate=0.1)
    monkeypatch.delitem(TINY, "learning_rate")
    train_here(max_iters=2, min_lr=0.05)
    assert checkpoint()["step"] == 2
    with pytest.raises(ConfigError, match=r"^min_lr \(0.2\) must not be above learning_rate \(0.1\)$"):
        train_here(max_iters=3, min_lr=0.2)
    assert checkpoint()["step"] == 2


def test_a_finished_run_says_so_and_a_higher_max_iters_goes_on(dataset, capsys):
    train_here()
    capsys.readouterr()
    before = checkpoint()
    train_here()
    assert losses(capsys.readouterr().out).keys() == {20}  # which it evaluates
    assert same(checkpoint(), before)
    train_here(max_iters=30)
    assert "resuming from out/ckpt.pt at step 20; changed since: max_iters 20 -> 30\n" in capsys.readouterr().out
    assert checkpoint()["step"] == 30


def test_a_run_that_is_past_max_iters_takes_no_step(dataset, capsys, monkeypatch):
    train_here()
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step is taken"))
    before = {path.name: path.read_bytes() for path in Path("out").glob("*.*")}
    with pytest.raises(ConfigError, match=r"^out/ckpt.pt is at step 20, past --max_iters=10: raise it, or take"):
        train_here(max_iters=10)
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.*")} == before
    capsys.readouterr()
    train_here(max_iters=10, eval_only=True)  # which takes none anyway
    assert losses(capsys.readouterr().out).keys() == {20}


def test_a_key_that_is_newer_than_the_checkpoint_is_no_change(dataset, capsys):
    train_here(max_iters=10)
    content = checkpoint()
    del content["config"]["deterministic"]
    torch.save(content, "out/ckpt.pt")
    train_here(max_iters=10)
    assert "resuming from out/ckpt.pt at step 10\n" in capsys.readouterr().out


def test_changed_keys_are_named_and_take_effect(dataset, capsys):
    train_here()
    capsys.readouterr()
    shutil.copytree("out", "other")
    train_here(max_iters=30, weight_decay=0.1, learning_rate=0.01, dropout=0.3, out_dir="other")
    train_here(max_iters=30, weight_decay=0.5, learning_rate=0.01, dropout=0.3)
    assert not same(checkpoint()["model"], checkpoint("other/ckpt.pt")["model"])
    assert (
        "changed since: dropout 0.1 -> 0.3, learning_rate 0.001 -> 0.01, max_iters 20 -> 30, weight_decay 0.1 -> 0.5"
        in (capsys.readouterr().out)
    )
    assert float(reports()[-1]["lr"]) == pytest.approx(learning_rate(29, config(max_iters=30, learning_rate=0.01)))
    assert checkpoint()["model_config"]["dropout"] == 0.3


def test_scratch_starts_over_and_resume_wants_a_checkpoint(dataset, capsys):
    with pytest.raises(ConfigError, match=r"there is no out/ckpt.pt to resume"):
        train_here(init_from="resume")
    train_here(seed=1)
    first = checkpoint()
    train_here(seed=2, init_from="scratch")
    assert checkpoint()["step"] == 20
    assert not same(checkpoint()["model"], first["model"])
    assert len(rows()) == len({(row["step"], row["val_loss"]) for row in rows()})


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"block_size": 8}, "block_size 16 -> 8"),
        ({"model": "bigram"}, "model 'gpt' -> 'bigram'"),
        ({"dataset": "other"}, "vocab_size 21 -> 2, chars"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_kept(dataset, changes, difference):
    train_here()
    (dataset.parent / "other").mkdir()
    (dataset.parent / "other" / "input.txt").write_text("ab" * 5000)
    before = checkpoint()
    with pytest.raises(ConfigError) as error:
        train_here(**changes, max_iters=30)
    assert str(error.value).startswith("out/ckpt.pt holds another model or text or optimizer than asked for (")
    assert difference in str(error.value)
    assert str(error.value).endswith(
        "); take another --out_dir, where --init_from=out/ckpt.pt fine-tunes these weights"
    )
    assert same(checkpoint(), before)
    train_here(**changes, max_iters=1, out_dir="another")
    train_here(**changes, max_iters=1, init_from="scratch")
    assert checkpoint()["step"] == 1


def test_a_checkpoint_of_any_other_shape_is_refused(dataset):
    """Whatever belongs to the shape: all that GPTConfig has, but for dropout."""
    train_here(max_iters=1)
    before = checkpoint()
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {"vocab_size", "dropout"}
    for name in names:
        old = before["model_config"][name]
        new = not old if isinstance(old, bool) else 2 * old
        with pytest.raises(ConfigError, match=re.escape(f"({name} {old} -> {new})")):
            train_here(**{name: new}, max_iters=2)
    assert same(checkpoint(), before)


def test_another_text_under_a_running_model_is_refused(dataset, capsys):
    """Of the same characters and the same length: only its sha256 tells."""
    train_here()
    before = checkpoint()
    text = Path("data/shakespeare_char/input.txt").read_text()
    Path("other.txt").write_text(text[::-1])
    prepare.main(["--dataset=shakespeare_char", "--input=other.txt"])
    with pytest.raises(ConfigError) as error:
        train_here(max_iters=30)
    assert re.fullmatch(
        r"out/ckpt.pt holds another model or text or optimizer than asked for \(sha256 '.*' -> '.*'\); "
        r"take another --out_dir, where --init_from=out/ckpt.pt fine-tunes these weights",
        str(error.value),
    )
    assert same(checkpoint(), before)
    train_here(init_from="out/ckpt.pt", out_dir="fine", max_iters=1)  # on purpose
    Path("data/shakespeare_char/input.txt").write_text(text)
    prepare.main([])
    train_here(max_iters=30)
    assert checkpoint()["step"] == 30


def test_the_same_text_split_elsewhere_is_another_one(dataset):
    """Its best loss would be of another validation text."""
    train_here()
    prepare.main(["--val_fraction=0.2"])
    with pytest.raises(
        ConfigError, match=r"^out/ckpt.pt holds another .* \(train_tokens 18000 -> 16000\); take another --out_dir"
    ):
        train_here(max_iters=30)


def test_a_checkpoint_without_sha256_is_an_older_one_and_opens(dataset):
    train_here()
    content = checkpoint()
    del content["sha256"], content["train_tokens"]
    torch.save(content, "out/ckpt.pt")
    train_here(max_iters=30)
    assert checkpoint()["sha256"] == load_meta("shakespeare_char")["sha256"]


class Hostile:
    def __reduce__(self):
        return (open, ("code_was_run", "w"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "hostile", "format", "shapes", "keys"])
def test_damaged_and_hostile_checkpoints_are_refused_in_one_line(dataset, damage):
    train_here()
    path = dataset.parent.parent / "out" / "ckpt.pt"
    data, content = path.read_bytes(), checkpoint()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        place = data.index(content["model"]["transformer.wte.weight"].numpy().tobytes()) + 100
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no checkpoint")
    elif damage == "hostile":
        torch.save(content | {"config": Hostile()}, path)
    elif damage == "format":
        torch.save(content | {"format": 2}, path)
    elif damage == "shapes":
        torch.save(content | {"model": content["model"] | {"transformer.wpe.weight": torch.zeros(3, 3)}}, path)
    elif damage == "keys":
        torch.save({"format": 1}, path)
    (path.parent / "best.pt").unlink()
    for program in (train_here, lambda: sample.main([])):
        with pytest.raises(UserError, match=r"^cannot open out/ckpt.pt \(.+\); restore"):
            program()
    assert not (dataset.parent.parent / "code_was_run").exists()
    if damage == "truncated":
        ended = command("train.py", *tiny())
        assert ended.returncode == 1
        assert ended.stderr.startswith("train.py: cannot open out/ckpt.pt (BadZipFile")
        assert ended.stderr.count("\n") == 1


# The loop


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(dataset, monkeypatch):
    def poisoned(model, state, *rest, original=train.train_step):
        if state.step == 13:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)
        return original(model, state, *rest)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(UserError) as error:
        train_here()
    lr = learning_rate(14, config())  # of the report, at step 15
    assert str(error.value).startswith(f"loss is nan, gradient norm nan at step 15, learning rate {lr:.1e}; ")
    assert "Try a lower --learning_rate" in str(error.value)
    assert checkpoint()["step"] == 10
    assert all(tensor.isfinite().all() for tensor in checkpoint()["model"].values())


def test_an_infinite_gradient_stops_the_run_too(folder):
    state = train.State(GPT(config().model_config(5)), None, torch.amp.GradScaler("cpu", enabled=False), {}, step=5)
    log = train.Log(config(), state, ALONE)
    log.since_step = 4
    with pytest.raises(UserError, match="gradient norm inf at step 5"):
        log.report(metrics(1.0, math.inf))
    assert not Path("out").exists()
    Path("out").mkdir()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)  # float16: the scaler has skipped that step
    log.report(metrics(1.0, math.inf))
    assert reports()[-1]["grad_norm"] == "inf"


@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_whatever_the_gradient_and_the_scaler(folder, scaled):
    """A scaler would go on for as many steps as the scale can be halved, none of which changes a weight."""
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    log = train.Log(config(), train.State(GPT(config().model_config(5)), None, scaler, {}, step=5), ALONE)
    log.since_step = 4
    for figures in ([math.inf, 1.0], [math.nan, math.inf]):
        with pytest.raises(UserError, match=f"^loss is {figures[0]}, gradient norm {figures[1]} at step 5, "):
            log.report(metrics(*figures))
    assert not Path("out").exists()


def test_weights_that_are_not_finite_are_never_saved(dataset, monkeypatch):
    def poisoned(model, state, *rest, original=train.train_step):
        metrics = original(model, state, *rest)
        if state.step == 19:  # the last update: no later loss would show it
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)
        return metrics

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(UserError, match="weights are not finite at step 20"):
        train_here()
    assert checkpoint()["step"] == 10


def test_max_iters_is_exactly_the_number_of_steps(dataset, monkeypatch):
    steps = []

    def counting(model, state, *rest, original=train.train_step):
        steps.append(state.step)
        return original(model, state, *rest)

    monkeypatch.setattr(train, "train_step", counting)
    train_here(max_iters=17)
    assert steps == list(range(17))
    assert checkpoint()["step"] == 17


@pytest.fixture
def always_due(monkeypatch):
    """Progress is shown whenever it can be, not twice a second: ten seconds pass between any two looks at the clock."""
    monkeypatch.setattr("config.time.monotonic", itertools.count(0, 10).__next__)
    monkeypatch.setattr(train.progress, "shown", -math.inf)


def test_the_console_and_the_log_show_the_same_run(dataset, capsys, always_due):
    train_here()
    captured = capsys.readouterr()
    lines = captured.out.splitlines() + captured.err.splitlines()
    number = r"\d+\.\d+"
    assert sum(bool(re.fullmatch(rf"step \d+: train loss {number}, val loss {number}", line)) for line in lines) == 3
    progress = (
        rf"step \d+/20 \| loss {number} \| lr {number}e-\d+ \| grad {number} \| [\d,.]+k tok/s \| eta 0:\d\d:\d\d"
    )
    assert sum(bool(re.fullmatch(progress, line)) for line in lines) == 5  # with the reports
    for split in ("train", "val"):
        assert f"evaluating data/shakespeare_char/{split}.bin: 0%" in lines
    header = (dataset.parent.parent / "out" / "log.csv").read_text().splitlines()[0]
    assert header == "step,seconds,loss,train_loss,val_loss,bits_per_byte,lr,grad_norm,tokens_per_second,mfu"
    evaluations, reports = ([row for row in rows() if row[name]] for name in ("val_loss", "loss"))
    assert [int(row["step"]) for row in rows()] == [0, 1, 5, 10, 10, 15, 20, 20]  # a row each
    assert [int(row["step"]) for row in evaluations] == [0, 10, 20]
    assert [int(row["step"]) for row in reports] == [1, 5, 10, 15, 20]
    for names, found in ((("train_loss", "val_loss"), evaluations),
                         (("loss", "lr", "grad_norm", "tokens_per_second"), reports)):  # fmt: skip
        for row in found:
            assert {name for name in row if row[name]} == {"step", "seconds", *names}
    assert losses("\n".join(lines))[20][1] == pytest.approx(float(rows()[-1]["val_loss"]), abs=1e-4)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_log_that_cannot_be_written_costs_no_step_and_no_row(dataset, monkeypatch, capsys, tensorboard):
    """On Windows, Excel keeps others from writing a file that it shows. Here a folder is in the way for some steps."""

    def step(model, state, *rest, original=train.train_step):
        if state.step == 3:
            Path("out/log.csv").rename("aside")
            Path("out/log.csv").mkdir()
        if state.step == 17:
            Path("out/log.csv").rmdir()
        return original(model, state, *rest)

    train_here(out_dir="whole")
    monkeypatch.setattr(train, "train_step", step)
    train_here(tensorboard=tensorboard)
    assert [row | {"seconds": "", "tokens_per_second": ""} for row in rows()] == [
        row | {"seconds": "", "tokens_per_second": ""} for row in rows("whole/log.csv")
    ]
    assert same(checkpoint()["model"], checkpoint("whole/ckpt.pt")["model"])
    [line] = re.findall("cannot write.*", capsys.readouterr().out)
    assert "out/log.csv" in line
    if tensorboard:
        assert [*events()["val_loss"]] == [0, 10, 20]


def test_curves_that_cannot_be_written_cost_no_row(dataset, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def fails(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fails)
    train_here(tensorboard=True)
    assert [row["step"] for row in rows()] == ["0", "1", "5", "10", "10", "15", "20", "20"]
    assert capsys.readouterr().out.count("Disk quota exceeded") == 1


def test_torn_and_damaged_rows_of_the_log_are_dropped(dataset):
    train_here()
    expected = rows()
    with open("out/log.csv", "ab") as file:
        file.write(b"25,abc,,,,,,\n\xff\n" + bytes(200_000) + b'\n11,"\n12,3.1,2.')
    train_here(max_iters=20)
    assert [row | {"seconds": ""} for row in rows()] == [row | {"seconds": ""} for row in expected]
    Path("out/log.csv").write_text("")
    train_here(max_iters=21)
    assert [int(row["step"]) for row in rows()] == [20, 21, 21]  # 20 is evaluated again


def test_saving_does_not_count_as_training(dataset, monkeypatch):
    clock, step, save = [0], train.train_step, train.State.save

    def timed(work, seconds):
        def worked(*arguments):
            clock[0] += seconds
            return work(*arguments)

        return worked

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(train, "train_step", timed(step, 1))
    monkeypatch.setattr(train.State, "save", timed(save, 100))
    train_here(max_iters=10, eval_interval=5, log_interval=1)
    speed = [row["tokens_per_second"] for row in rows() if row["loss"]]
    assert len(speed) == 10 and len(set(speed)) == 1, speed


def test_the_best_loss_is_told_with_its_step_also_after_a_resume(dataset, capsys):
    train_here(max_iters=30, learning_rate=0.3, min_lr=0.3, weight_decay=0, eval_interval=5)  # wild on purpose
    step, loss = checkpoint("out/best.pt")["step"], checkpoint("out/best.pt")["best_val_loss"]
    told = rf"^best validation loss {loss:.4f} at step {step}, last [\d.]+, after (\d+) s; try python sample.py --out"
    assert step < 30
    assert re.search(told, capsys.readouterr().out, re.MULTILINE)
    log = Path("out/log.csv").read_text().splitlines()
    *lines, report, evaluation = [line.split(",") for line in log]
    report[1] = "1000.25"  # seconds of all starts together; the evaluation is repeated
    Path("out/log.csv").write_text("".join(",".join(row) + "\n" for row in (*lines, report, evaluation)))
    train_here(max_iters=30)
    assert 1000 <= int(re.search(told, capsys.readouterr().out, re.MULTILINE)[1]) < 1100


def test_a_run_that_was_never_evaluated_after_step_0_names_no_best_loss(dataset, capsys, monkeypatch):
    monkeypatch.setattr(train.StopSignals, "received", signal.SIGTERM)
    train_here()
    train_here(eval_only=True)
    assert "best validation loss" not in capsys.readouterr().out


def test_a_long_run_on_a_cpu_says_so_before_its_first_evaluation_and_names_the_small_recipe(
    dataset, capsys, monkeypatch
):
    train_here(max_iters=4)
    assert "hours" not in capsys.readouterr().out
    settings = config(max_iters=36_004)
    work = train.flops_of_run(GPT(settings.model_config(21)), settings)
    monkeypatch.setattr(train, "CPU_FLOPS", work / torch.get_num_threads() / 3600 / 10)
    monkeypatch.setattr(train, "evaluate", lambda *_: pytest.exit("too late", 1))
    for max_iters, hours in ((36_004, "10.0"), (18_002, "5.0")):
        with pytest.raises(pytest.exit.Exception):
            train_here(max_iters=max_iters, out_dir=f"out/{max_iters}")
        small = "python train.py config/shakespeare_char_cpu.py takes a minute or two"
        assert f"this takes hours on a CPU, on one like ours about {hours}; {small}\n" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_refused_with_the_way_that_works(dataset):
    """Another vocabulary: prepare the text in the weights' tokens. Another shape: leave it to them."""
    train_here(max_iters=1)
    Path("mine.txt").write_text("fair land " * 500)
    prepare.main(["--dataset=mine", "--input=mine.txt"])
    fine = {"init_from": "out/best.pt", "out_dir": "fine", "max_iters": 1}
    with pytest.raises(ConfigError) as error:
        train_here(**fine, dataset="mine")
    way = "python prepare.py --dataset=NAME --input=FILE --tokenizer=out/best.pt"
    assert re.fullmatch(rf"out/best.pt holds another model .* \(vocab_size .*\); .*; {way} makes .*", str(error.value))
    prepare.main(way.replace("NAME", "mine").replace("FILE", "mine.txt").split()[2:])
    with pytest.raises(ConfigError, match=r"\(n_layer 2 -> 3, n_embd 32 -> 64\); leave out keys of the shape"):
        train_here(**fine, dataset="mine", n_layer=3, n_embd=64)
    train_here(**fine, dataset="mine")


def shown(text):
    """What a terminal shows: \\r\\033[K erases the line."""
    return [line.split("\r\033[K")[-1] for line in text.split("\n")]


def test_what_is_piped_on_has_no_progress_in_it(dataset):
    ended = command("train.py", *tiny())
    assert "/20 |" not in ended.stdout
    assert ended.stderr.splitlines()[0] == "evaluating data/shakespeare_char/train.bin: 0%"  # said at once
    assert ended.stderr.count("\n") < 5  # and then nothing for some seconds


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.5), (False, 5)])
def test_progress_is_shown_by_time(capsys, monkeypatch, terminal, seconds):
    now = [100.0]
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(train.progress, "shown", -math.inf)
    for tick in range(200):
        now[0] += 0.1
        train.progress.show(f"tick {tick}")
    assert capsys.readouterr().err.count("tick") == pytest.approx(20 / seconds, rel=0.2)


def test_a_terminal_beside_a_pipe_shows_progress_in_one_line(dataset, capsys, monkeypatch, always_due):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    train_here()
    captured = capsys.readouterr()
    assert "/20 |" not in captured.out
    assert captured.err.count("/20 |") == 5
    assert [line for line in shown(captured.err) if line] == []


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Some Other Card", None),
    ],
)
@pytest.mark.parametrize("world_size", [1, 8])
def test_mfu_is_shown_where_the_peak_of_the_device_is_known(
    folder, capsys, monkeypatch, always_due, card, peak, world_size
):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: card)
    process = Process(0, world_size, torch.device("cuda"), torch.bfloat16)
    settings = config()
    monkeypatch.setattr(Process, "all_reduce", lambda self, values: values * world_size)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    log = train.Log(settings, train.State(GPT(settings.model_config(5)), None, scaler, {}), process)
    log.state.step = 1
    log.report(metrics(2.0, 1.0))
    [row] = rows()
    assert peak_flops(process.device, process.dtype) == peak
    assert ("| mfu " in capsys.readouterr().err) == (peak is not None)
    if peak:
        flops = GPT(settings.model_config(5)).flops_per_token()
        assert float(row["mfu"]) == pytest.approx(
            flops * float(row["tokens_per_second"]) / (peak * world_size), rel=1e-4
        )


def test_float32_has_no_mfu_for_the_known_peaks_are_those_of_16_bits(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    peaks = {dtype: peak_flops(torch.device("cuda"), dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    assert peaks == {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: None}


def events(out_dir="out"):
    """What TensorBoard finds: {name: {step: value}}."""
    found = event_accumulator.EventAccumulator(out_dir, {"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_the_curves(dataset):
    train_here(tensorboard=True, max_iters=10, eval_iters=0)
    train_here(tensorboard=True, max_iters=20, eval_iters=0)
    scalars = events()
    logged = rows()
    for name in ("loss", "train_loss", "val_loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second"):
        expected = {int(row["step"]): float(row[name]) for row in logged if row[name]}
        assert len(expected) >= 3
        assert scalars[name] == pytest.approx(expected, rel=1e-5), name


def test_tensorboard_shows_an_evaluation_while_the_run_goes_on(dataset, monkeypatch):
    """Or it shows curves late, and after SIGKILL never. Here no file can be appended to: only a flush writes it."""

    def watched(model, state, *rest, original=train.train_step):
        if state.step == 10:
            found.extend(events()["val_loss"])
        return original(model, state, *rest)

    found = []
    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.delattr("tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem.append")
    train_here(tensorboard=True, max_iters=11)
    assert found == [0, 10]


def test_tensorboard_keeps_the_step_at_which_a_run_was_stopped(dataset, monkeypatch):
    with monkeypatch.context() as stopped:
        signal_in_step(stopped, signal.SIGTERM, last=14)
        assert train.main(tiny(tensorboard=True)) == 143
    train_here(tensorboard=True)
    assert set(events()["loss"]) == {1, 5, 10, 15, 20}


def test_tensorboard_changes_no_bit_and_forgets_steps_that_are_taken_again(dataset):
    train_here(out_dir="plain", dropout=0.3)
    train_here(out_dir="board", dropout=0.3, tensorboard=True, max_iters=10, lr_decay_iters=20)
    shutil.copy("board/ckpt.pt", "at 10.pt")
    train_here(out_dir="board", dropout=0.3, tensorboard=True, max_iters=15, lr_decay_iters=20)
    shutil.copy("at 10.pt", "board/ckpt.pt")  # as if it had been killed after step 15
    train_here(out_dir="board", dropout=0.3, tensorboard=True)
    assert same(checkpoint("board/ckpt.pt")["model"], checkpoint("plain/ckpt.pt")["model"])
    assert set(events("board")["val_loss"]) == {0, 10, 20}


def test_a_best_checkpoint_without_its_ckpt_is_not_overwritten(dataset):
    train_here()
    before = Path("out/best.pt").read_bytes()
    Path("out/ckpt.pt").unlink()
    with pytest.raises(
        ConfigError, match=r"^there is out/best.pt but no out/ckpt.pt: start from it with --init_from=out"
    ):
        train_here()
    assert Path("out/best.pt").read_bytes() == before
    train_here(init_from="out/best.pt", out_dir="more", max_iters=1)
    train_here(init_from="scratch", max_iters=1)
    assert checkpoint()["step"] == 1


def test_best_is_not_the_model_before_its_first_step(dataset, monkeypatch):
    monkeypatch.setattr(train.StopSignals, "received", signal.SIGTERM)
    train_here()
    assert (checkpoint()["step"], checkpoint()["best_val_loss"]) == (0, math.inf)
    assert not Path("out/best.pt").exists()
    monkeypatch.undo()
    monkeypatch.chdir(dataset.parent.parent)
    train_here(learning_rate=1, max_iters=10)
    assert float(rows()[0]["val_loss"]) < float(rows()[-1]["val_loss"])
    assert checkpoint("out/best.pt")["step"] == 10


def test_flops_are_six_a_weight_and_twelve_t_c_an_attention():
    settings = TrainConfig()
    model = GPT(settings.model_config(65))
    expected = 6 * (65 * 384 + 6 * 12 * 384**2) + 12 * 6 * 256 * 384
    assert model.flops_per_token() == expected
    assert Bigram(settings.model_config(65)).flops_per_token() == 0


def test_a_bigram_has_no_context_to_crop(dataset):
    train_here(model="bigram", max_iters=1)
    with pytest.raises(ConfigError, match=r"^out/best.pt holds another model .* \(block_size 16 -> 4\)"):
        train_here(init_from="out/best.pt", out_dir="more", block_size=4)


def test_the_bigram_model_trains_and_resumes(dataset, capsys):
    train_here(model="bigram", learning_rate=0.1, max_iters=40)
    assert losses(capsys.readouterr().out)[40][1] < 2.5
    train_here(model="bigram", learning_rate=0.1, max_iters=50)
    assert list(checkpoint()["model"]) == ["lm_head.weight"]
    assert checkpoint()["step"] == 50


# Devices and mistakes


def test_deterministic_asks_torch_for_it(dataset):
    train_here(max_iters=2, deterministic=True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert checkpoint()["step"] == 2


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
        ("cuda", {}, 0),
        ("cuda:1", {}, 1),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate=1"], "unknown key --lerning_rate, did you mean --learning_rate?"),
        (["--lr=1"], "unknown key --lr: it is --learning_rate"),
        (["--eval-iters=1"], "unknown key --eval-iters, did you mean --eval_iters?"),
        (["--wandb_log=True"], "unknown key --wandb_log: it is --tensorboard"),
        (["--n_layer=two"], "--n_layer must be a whole number, at least 0, found 'two'"),
        (["--n_head=5"], "n_embd (384) must be divisible by n_head (5)"),
        (["--dropout=1"], "--dropout must be a number, at least 0 and below 1, found '1'"),
        (["--batch_size=0"], "--batch_size must be a whole number, at least 1, found '0'"),
        (["--max_iters=-5"], "--max_iters must be a whole number, at least 1, found '-5'"),
        (["--learning_rate=nan"], "--learning_rate must be a number, at least 0, found 'nan'"),
        (["--learning_rate=1e-5", "--min_lr=1e-4"], "min_lr (0.0001) must not be above learning_rate (1e-05)"),
        (["--beta2=1"], "--beta2 must be a number, at least 0 and below 1, found '1'"),
        (["--lr_decay_iters=-5"], "--lr_decay_iters must be a whole number or None, at least 1, found '-5'"),
        (["--seed=18446744073709551616"],
         "--seed must be a whole number, at least 0 and below 9.22337e+18, found '18446744073709551616'"),
        (["--seed=-1"], "--seed must be a whole number, at least 0 and below 9.22337e+18, found '-1'"),
        (["--out_dir="], "out_dir is empty: it must name a folder"),
        (["--gradient_accumulation_steps=3"],
         "batch_size (32) must be divisible by the number of processes (1) x gradient_accumulation_steps (3)"),
        (["--device=gpu"], "device 'gpu' is not available; available: cpu"),
        (["--device=cpu", "--dtype=float16"],
         "float16 needs the loss scaling of a cuda device, found cpu; use bfloat16 or float32"),
        (["--dtype=float64"], "--dtype must be auto or float32 or bfloat16 or float16, found 'float64'"),
        (["--init_from=gpt5"],
         "there is no checkpoint in gpt5; python train.py makes one"),
        (["--dataset=../secrets"],
         "dataset must be a plain folder name (letters, digits, _ - .), found '../secrets'"),
        (["--dataset=none"],
         "there is no data/none/input.txt: python prepare.py --dataset=none --input=FILE makes it"),
        (["config/shakespeare.py"],
         "there is no recipe config/shakespeare.py, did you mean config/shakespeare_char.py?"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_done(dataset, arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        train.main(arguments)
    assert str(error.value) == message
    assert not list(Path().glob("out/*.*"))  # at most a lock


def test_a_hint_can_be_pasted_though_the_path_has_a_space(dataset, capsys):
    train_here(out_dir="out/my run")
    hint = re.search(r"try python (.*)\n$", capsys.readouterr().out)[1]
    sample.main([*shlex.split(hint)[1:], "--max_new_tokens=1"])
    Path("out/my run/ckpt.pt").unlink()
    with pytest.raises(ConfigError, match=r"start from it with --init_from='out/my run/best.pt' and"):
        train_here(out_dir="out/my run")


def test_an_out_dir_that_is_a_file_is_one_line_and_status_1(dataset):
    (dataset.parent.parent / "out").write_text("")
    ended = command("train.py", *tiny())
    assert ended.returncode == 1
    assert ended.stderr.startswith("train.py: [Errno ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_training_goes_on_without_the_terminal(dataset, closed):
    argv = [sys.executable, str(REPOSITORY / "train.py"), *tiny()]
    ended = subprocess.run(f"{shlex.join(argv)} {closed}", shell=True, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, without_progress(ended.stderr)) == (0, "")
    assert checkpoint()["step"] == 20


def test_a_text_that_cannot_be_shown_is_one_line(dataset, capsys, monkeypatch):
    """One sample, shown as it is made, and several, shown at the end."""
    train_here(max_iters=1)
    capsys.readouterr()
    said = "out/best.pt, step 1, on cpu, float32\nsample.py: [Errno 28] No space left on device\n"
    program = f"{sys.executable} {REPOSITORY / 'sample.py'} --num_samples=2 --max_new_tokens=9"
    ended = subprocess.run(f"{program} >/dev/full", shell=True, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, said)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--max_new_tokens=9"])
    with open("/dev/full", "w") as full, monkeypatch.context() as disk:
        disk.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            run(sample.main)
    assert (end.value.code, capsys.readouterr().err) == (1, said)


def test_a_name_that_is_no_utf8_may_be_written_to(dataset):
    argv = [sys.executable, str(REPOSITORY / "train.py"), *tiny(), b"--out_dir=out\xff"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, without_progress(ended.stderr)) == (0, "")
    assert Path(os.fsdecode(b"out\xff/ckpt.pt")).exists()


def test_too_little_memory_for_a_process_is_one_line(dataset):
    argv = [sys.executable, str(REPOSITORY / "train.py"), *tiny(n_embd=20_000, n_layer=1)]
    ended = subprocess.run(f"ulimit -v 3000000; {shlex.join(argv)}", shell=True, capture_output=True, text=True)
    assert ended.returncode == 1
    assert without_progress(ended.stderr) == "train.py: out of memory; try a smaller batch, model or context\n"


def test_ctrl_c_before_the_first_checkpoint_says_that_nothing_is_lost(dataset):
    program = """if True:
        import os, signal, train
        from config import run
        train.start = lambda *_: os.kill(os.getpid(), signal.SIGINT)
        run(train.main)
    """
    argv = [sys.executable, "-c", program, *tiny()]
    ended = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr == "-c: interrupted; nothing that was saved is lost\n"
    assert not Path("out/ckpt.pt").exists()


def test_ctrl_c_in_the_first_evaluation_leaves_a_run_that_resumes(dataset):
    argv = [sys.executable, str(REPOSITORY / "train.py"), *tiny(n_embd=512, n_layer=8, eval_iters=0)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr.readline() == "evaluating data/shakespeare_char/train.bin: 0%\n"
        time.sleep(0.5)  # a signal amid a print is noted, but not answered
        running.send_signal(signal.SIGINT)
        while (line := running.stderr.readline()).startswith("evaluating"):  # on a slow machine
            pass
        assert line == STOPPING  # before the evaluation's end, with which what is below comes
        out, errors = running.communicate(timeout=60)
    assert (running.returncode, without_progress(errors)) == (130, "")
    assert out.endswith("stopped by SIGINT after step 1; the same command resumes\n")
    assert checkpoint()["step"] == 1
    assert [row["step"] for row in rows()] == ["0", "1"]


def test_ctrl_c_is_answered_in_a_line_and_status_130(dataset):
    argv = [sys.executable, str(REPOSITORY / "train.py"), *tiny(max_iters=10**6)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while "step 10:" not in running.stdout.readline():
            pass
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert without_progress(errors) == STOPPING


# What a hacker may rely on


def test_a_key_of_the_model_is_two_lines(dataset):
    """In a copy of the programs: n_kv_head: int | None. It trains, resumes and samples; another value is refused."""
    copy = Path("copy")
    copy.mkdir()
    for name in ("model.py", "train.py", "sample.py", "prepare.py"):
        shutil.copy(REPOSITORY / name, copy)
    shutil.copytree(REPOSITORY / "config", copy / "config")
    new = {
        "model.py": "n_kv_head: int | None = None",
        "train.py": 'n_kv_head: int | None = key(None, "heads", least=1)',
    }
    old = {"model.py": "layer_norm: bool = True", "train.py": 'layer_norm: bool = key(True, "layer norms")'}
    for name, before in old.items():
        text = (copy / name).read_text()
        assert text.count(before) == 1
        (copy / name).write_text(text.replace(before, f"{before}\n    {new[name]}"))
    program = """if True:
        import sys, torch, sample, train
        from config import ConfigError
        tiny, found = sys.argv[1:], []
        old = torch.load("old/ckpt.pt", weights_only=True)  # without the key
        assert "n_kv_head" not in old["model_config"]
        for keys in (["--out_dir=old", "--max_iters=21"], [], ["--max_iters=21"], ["--out_dir=two", "--n_kv_head=2"]):
            train.main([*tiny, *keys])
        train.main(["--out_dir=two", "--max_iters=21"])
        for keys in (["--n_kv_head=1"], ["--out_dir=two", "--n_kv_head=None"]):
            try:
                train.main([*tiny, *keys])
            except ConfigError as error:
                found.append(str(error))
        sample.main(["--out_dir=two", "--max_new_tokens=3"])
        model = sample.load("two")[0]
        print(found, model.config.n_kv_head, sample.load("out")[0].config.n_kv_head)
    """
    train_here(out_dir="old")
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
    assert rates == [learning_rate(step, config()) for step in range(20)]
    logged = [float(row["lr"]) for row in reports("whole/log.csv")]
    assert logged == pytest.approx([rates[step] for step in (0, 4, 9, 14, 19)])
    train_here(max_iters=10, lr_decay_iters=20)
    train_here(lr_decay_iters=20)
    for name in ("model", "optimizer"):
        assert same(checkpoint()[name], checkpoint("whole/ckpt.pt")[name])
    shutil.copytree("out", "other")
    train_here(max_iters=25, out_dir="other")
    adagrad(monkeypatch, rates)  # whose decay is that of the settings, not of the state
    train_here(max_iters=25)
    assert not same(checkpoint()["model"], checkpoint("other/ckpt.pt")["model"])


def test_the_state_of_another_optimizer_is_refused(dataset, monkeypatch):
    """torch's AdamW would take Adagrad's, and fail in its first step."""
    train_here(max_iters=10)
    refused = r"optimizer_class '\w+' -> '{}'\); take another --out_dir, where --init_from=out/ckpt.pt fine-"
    adagrad(monkeypatch, [])
    with pytest.raises(ConfigError, match=refused.format("Adagrad")):
        train_here()
    train_here(init_from="scratch", max_iters=10)
    monkeypatch.setattr(train, "Optimizer", lambda model, *_: torch.optim.AdamW(model.parameters()))
    with pytest.raises(ConfigError, match=refused.format("AdamW")):
        train_here()
    assert checkpoint()["step"] == 10


def test_a_metric_in_the_row_is_a_column_and_older_rows_stay(dataset, monkeypatch):
    train_here(max_iters=10, lr_decay_iters=20)
    *before, _ = rows()  # the evaluation of step 10 is repeated
    with monkeypatch.context() as changed:
        changed.setattr(train, "evaluate", lambda *given, f=train.evaluate: f(*given) | {"accuracy": 0.5})
        extra = {"z_loss": torch.tensor(0.25)}  # of a step, a tensor on the device
        changed.setattr(train, "train_step", lambda *given, f=train.train_step: f(*given) | extra)
        train_here()
    assert Path("out/log.csv").read_text().startswith(",".join(train.Log.COLUMNS) + ",accuracy,z_loss\n")
    assert rows()[: len(before)] == [row | {"accuracy": "", "z_loss": ""} for row in before]
    assert [row["step"] for row in rows() if row["accuracy"] == "0.5"] == ["10", "20"]
    assert [row["step"] for row in rows() if row["z_loss"] == "0.25"] == ["15", "20"]
    *before, _ = rows()
    train_here(max_iters=30)  # without it
    assert rows()[: len(before)] == before
    assert rows()[-1]["accuracy"] == ""


WANDB = """
import sys

def init(**settings):
    assert "torch.utils.tensorboard" not in sys.modules, "too late: it patches SummaryWriter when that is made"
    print("wandb", settings)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_and_biases_is_a_line_of_a_recipe(dataset, rank):
    """As the comment in gpt2_124m.py has it: init comes before the writer that it follows, in process 0 alone."""
    Path("wandb.py").write_text(WANDB)
    lines = re.findall(r"^#     (.*(?:wandb|tensorboard).*)", (REPOSITORY / "config/gpt2_124m.py").read_text(), re.M)
    Path("recipe.py").write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": f".:{REPOSITORY}", "RANK": str(rank)}
    program = "import sys, train; train.main(sys.argv[1:])"
    argv = [sys.executable, "-c", program, "recipe.py", *tiny(max_iters=1)]
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("wandb {") == (rank == 0)
    assert "sync_tensorboard" in ended.stdout or rank
    assert list(Path("out").glob("events.out.tfevents.*"))
