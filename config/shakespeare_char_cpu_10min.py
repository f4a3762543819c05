# Tiny Shakespeare on a laptop, in ten minutes.
dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_cpu_10min"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 128
dropout = 0.1

max_iters = 1450
optimizer = "muon"
learning_rate = 4e-3
min_lr = 0.0
eval_interval = 290
