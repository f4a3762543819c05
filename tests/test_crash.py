"""A run that is killed goes on, by the same command, as if nothing had happened."""

import random
import signal
import subprocess
import sys

from conftest import REPOSITORY, checkpoint, command, rows, same, tiny, train_here

SETTINGS = tiny(max_iters=150, eval_interval=5, log_interval=5)


def test_a_run_killed_at_random_moments_ends_like_the_one_left_alone(dataset):
    assert command("train.py", *SETTINGS, "--out_dir=whole").returncode == 0
    chance = random.Random(0)
    argv = [sys.executable, str(REPOSITORY / "train.py"), *SETTINGS]
    for _ in range(3):
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as running:
            for _ in range(chance.randrange(8, 25)):  # lines, each within a step or a checkpoint of the last
                running.stdout.readline()
            running.send_signal(signal.SIGKILL)
    killed_at = checkpoint()["step"]
    assert 0 < killed_at < 150
    assert command("train.py", *SETTINGS).returncode == 0
    for name in ("model", "optimizer", "step", "best_val_loss"):
        assert same(checkpoint()[name], checkpoint("whole/ckpt.pt")[name])
    assert same(checkpoint("out/best.pt")["model"], checkpoint("whole/best.pt")["model"])
    timing = {"seconds": None, "tokens_per_second": None}
    assert [row | timing for row in rows()] == [row | timing for row in rows("whole/log.csv")]


def test_what_a_killed_write_leaves_behind_disturbs_nobody(dataset):
    train_here(max_iters=10)
    (dataset.parent.parent / "out" / "ckpt.pt.tmp").write_bytes(b"half a checkpoint")
    train_here(max_iters=20)
    assert checkpoint()["step"] == 20
    assert not (dataset.parent.parent / "out" / "ckpt.pt.tmp").exists()
