"""The CUDA path: on tensors without values, on a CPU that does what is asked of a GPU, and on a GPU if there is one.

fake_cuda.py says what the first shows and what it cannot show.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, checkpoint, command, losses, same, tiny

import prepare
import sample
import train


def on_gpu(**changes):
    short = {"device": "auto", "dtype": "auto", "compile": False, "max_iters": 2, "eval_interval": 1, "eval_iters": 2}
    return ["train", *tiny(**short | changes)]


GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 12, "bias": True, "dropout": 0}
RUNS = {
    "bfloat16": on_gpu(),
    "float16": on_gpu(dtype="float16"),
    "float32": on_gpu(dtype="float32"),
    "accumulation": on_gpu(gradient_accumulation_steps=2),
    "bigram": on_gpu(model="bigram"),
    "muon": on_gpu(optimizer="muon"),
    "no clipping": on_gpu(grad_clip=0),
    "resumed": on_gpu(out_dir="cpu"),
    "124M": on_gpu(dataset="gpt2", max_iters=1, eval_iters=1, **GPT2),
    "one sample": ["sample", "--out_dir=cpu", "--max_new_tokens=20"],
    "samples": ["sample", "--out_dir=cpu", "--max_new_tokens=20", "--num_samples=3", "--top_k=3", "--top_p=0.9"],
    "float32 sample": ["sample", "--out_dir=cpu", "--max_new_tokens=20", "--dtype=float32"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The facts of every run, from one process."""
    if not shutil.which("c++") or not torch.__version__.startswith("2.13.") or torch.backends.cuda.is_built():
        pytest.skip("the stub of CUDA needs a C++ compiler, and torch 2.13 without a CUDA of its own")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("fake_cuda"))
        Path("input.txt").write_text("To be, or not to be, that is the question. " * 300)
        prepare.main(["--dataset=shakespeare_char", "--input=input.txt"])
        gpt2 = Path("data/gpt2")
        gpt2.mkdir()
        (gpt2 / "meta.json").write_text('{"tokenizer": "gpt2", "vocab_size": 50257}')
        for split in ("train", "val"):
            np.arange(13 * 1024, dtype="<u2").tofile(gpt2 / f"{split}.bin")
        train.main(tiny(out_dir="cpu", max_iters=1))
        argv = [sys.executable, str(REPOSITORY / "tests" / "fake_cuda.py"), json.dumps(RUNS)]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("run", RUNS)
def test_every_operator_finds_its_tensors_on_the_gpu(found, run):
    assert found[run]["error"] is None


@pytest.mark.parametrize("run", [run for run in RUNS if RUNS[run][0] == "train"])
def test_no_step_waits_for_the_gpu_and_an_evaluation_only_for_its_loss(found, run):
    waits = found[run]["waits"]
    # The scaler looks for gradients that overflow, and a report for its scale.
    scaler = {"train.py: train_step", "train.py: check_finite"} if run == "float16" else set()
    assert waits.keys() == {"train.py: report", "train.py: mean_loss"} | scaler
    # Three evaluations of two splits; "resumed" at step 1 makes two.
    assert waits["train.py: mean_loss"] == {"resumed": 4, "124M": 4}.get(run, 6)


@pytest.mark.parametrize(("run", "tokens"), [("one sample", 20), ("float32 sample", 20), ("samples", 0)])
def test_a_sample_waits_for_the_gpu_only_to_be_shown(found, run, tokens):
    assert sum(found[run]["waits"].values()) == tokens + 1  # and once for the prompt, or for all of the texts


@pytest.mark.parametrize("run", [*RUNS])
def test_matrix_products_have_the_dtype(found, run):
    expected = "float32" if "float32" in run else "float16" if run == "float16" else "bfloat16"
    assert found[run]["dtypes"] == ([] if run == "bigram" else [f"torch.{expected}"])


def test_gpt2s_vocabulary_is_padded_for_tensor_cores(found):
    assert 50304 in found["124M"]["widths"]


def test_gpt2_small_with_12_sequences_of_1024_takes_less_than_12_gb(found):
    assert 8e9 < found["124M"]["peak"] < 12e9


@pytest.fixture
def replays(gpus, monkeypatch):
    """In place of CUDA graphs: a replay reads what is copied to the tensors that it was recorded with."""
    done = []

    def record(module, sample):
        cached = torch.is_autocast_cache_enabled()

        def replay(*inputs):
            for place, given in zip(sample, inputs, strict=True):
                assert place.shape == given.shape
                place.copy_(given)
            output = module(*sample)
            assert isinstance(output, torch.Tensor) and not cached  # or CUDA graphs refuse it
            done.append(output)
            return output

        return replay

    monkeypatch.setattr("torch.cuda.make_graphed_callables", record)
    return done


def test_replayed_steps_end_at_the_bits_of_plain_ones(dataset, replays):
    for compiled in ("auto", False):
        train.main(on_gpu(compile=compiled, out_dir=f"out/{compiled}")[1:])
    assert same(*(checkpoint(f"out/{compiled}/ckpt.pt")["model"] for compiled in ("auto", False)))
    assert len(replays) == 2  # of the first run alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_are_scaled_in_float16_only(dataset, gpus, dtype):
    """Where small ones would vanish."""
    train.main(on_gpu(dtype=dtype)[1:])
    scaler = checkpoint()["scaler"]
    assert scaler.get("scale", 1) == (2**16 if dtype == "float16" else 1)


def test_no_batch_is_waited_for_and_each_has_a_dropout_of_its_own(dataset, gpus):
    train.main(on_gpu(gradient_accumulation_steps=2)[1:])
    assert len(gpus.mode.copies) >= 4
    assert set(gpus.mode.copies) == {(True, True)}  # pinned, and not waited for: the second needs the first
    assert len(set(gpus.seeds)) >= 4


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("program", ["train", "sample"])
def test_the_number_type_is_that_of_the_card_in_use(dataset, gpus, capsys, program, index):
    """Of its own, not emulated."""
    if program == "sample":
        train.main(on_gpu(device="cpu", max_iters=1)[1:])
    for lacking, dtype in ((index, "float16"), (1 - index, "bfloat16")):
        gpus.current, gpus.bfloat16 = 0, {0, 1} - {lacking}
        capsys.readouterr()
        if program == "train":
            train.main(on_gpu(device=f"cuda:{index}", out_dir=dtype, max_iters=1)[1:])
        else:
            sample.main([f"--device=cuda:{index}", "--max_new_tokens=1"])
        assert f", {dtype}\n" in "".join(capsys.readouterr())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("compiled", [False, "auto", True])
def test_a_real_gpu_learns_resumes_and_samples(dataset, capsys, dtype, compiled):
    for max_iters in (20, 40):
        train.main(on_gpu(dtype=dtype, compile=compiled, max_iters=max_iters, eval_interval=20)[1:])
    found = losses(capsys.readouterr().out)
    assert found[40][1] < found[20][1] < found[0][1] - 0.1
    sample.main(["--max_new_tokens=40", "--start=the king"])
    assert len(capsys.readouterr().out) == len("the king") + 40 + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_run_ends_at_the_bits_of_an_unrecorded_one(dataset):
    for compiled in ("auto", False):
        settings = {"compile": compiled, "out_dir": f"out/{compiled}", "optimizer": "muon", "deterministic": True}
        command("train.py", *on_gpu(**settings, max_iters=50, eval_interval=50)[1:])
    auto, plain = (checkpoint(f"out/{compiled}/ckpt.pt")["model"] for compiled in ("auto", False))
    assert same(auto, plain)
