# GPT-2 small (124M parameters) on 10 billion tokens of FineWeb, which are downloaded first: 21 GB. Not run yet.
#
#     python prepare.py --dataset=fineweb --shards=2                  for a trial, first: 0.6 GB instead of 21
#     python train.py config/gpt2_124m.py                             one GPU
#     torchrun --nproc_per_node=8 train.py config/gpt2_124m.py        eight
#     torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 \
#         train.py config/gpt2_124m.py                                the first of two machines
#
# The second machine runs the same command with --node_rank=1. Both must see the same folder. A run resumes with as many
# shards as it began with, and on any number of GPUs that divides its step of 512 sequences: 1, 2, 4 to 32 with the
# micro-batches below. Ctrl-C ends all processes after the same step. torchrun --max_restarts=3 starts them again when
# one is lost, if TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is in the environment. These lines in a recipe show the run in
# Weights & Biases (pip install wandb tensorboard):
#
#     import os, wandb
#     if os.environ.get("RANK", "0") == "0": wandb.init(project="my-gpt", sync_tensorboard=True)
#     tensorboard = True
#
# The validation loss is that of the first 10,485,760 tokens of FineWeb's validation shard, as llm.c and modded-nanogpt
# measure it: 3.28 for llm.c's AdamW after as many tokens. Predicted for these values: 3.23 (tests/benchmark.md).
import os

dataset = "fineweb"
out_dir = "out/gpt2_124m"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.0
bias = True

batch_size = 512  # sequences: 524,288 tokens a step, on 1, 2, 4 ... 32 GPUs
# 16 sequences at a time: 12 GB, calculated. Fewer are slower, more are hardly faster.
gradient_accumulation_steps = max(1, batch_size // 16 // int(os.environ.get("WORLD_SIZE", 1)))
max_iters = 19_073  # 10 billion tokens

optimizer = "muon"
# Of the blocks' matrices as in modded-nanogpt's record of 2024-10-10, which took 3.25 billion tokens to 3.28.
learning_rate = 1.8e-3
min_lr = 0.0
warmup_iters = 700
weight_decay = 0.1
beta2 = 0.95

eval_interval = 1000
eval_iters = 20
