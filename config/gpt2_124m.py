# GPT-2 small (124M parameters) on 8 GPUs: torchrun --nproc_per_node=8 train.py config/gpt2_124m.py. Not measured yet.
#
# data/openwebtext/ is yours to bring: train.bin and val.bin of GPT-2 tokens, as nanoGPT writes them, and beside them a
# meta.json that says {"tokenizer": "gpt2", "vocab_size": 50257}; or made by prepare.py --tokenizer=gpt2.
dataset = "openwebtext"
out_dir = "out/gpt2_124m"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.0
bias = True

batch_size = 480  # half a million tokens a step, on each of 8 GPUs 3 times 20 sequences: 15 GB, calculated
gradient_accumulation_steps = 3
max_iters = 600_000
optimizer = "adamw"
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 0.1
beta2 = 0.95
eval_interval = 1000
eval_iters = 10
log_interval = 10
