# Tiny Shakespeare on a laptop, in one minute.
dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_cpu"

n_layer = 2  # small: what counts in a minute is how much of the text it reads
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0

batch_size = 48
max_iters = 2000
optimizer = "muon"
learning_rate = 5e-3
min_lr = 0.0
eval_interval = 250
