# nanoGPT's values for the reference model on Tiny Shakespeare, for comparisons: it reports 1.4697, and this repository
# measured 1.4703 at step 1750 of 5000 on an H100 (commit 0db5823, torch 2.11.0); from there on it only learns by heart.
dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_nanogpt"

dropout = 0.2

batch_size = 64
max_iters = 5000
optimizer = "adamw"
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
weight_decay = 0.1
beta2 = 0.99  # longer memory than the usual 0.95: few tokens in a step make noisy gradients
eval_interval = 250
