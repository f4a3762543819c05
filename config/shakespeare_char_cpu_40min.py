# The reference model of shakespeare_char.py on a laptop, in forty minutes.
dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_cpu_40min"

max_iters = 1000  # a learning rate that ends where the run ends does in 1000 steps what a longer decay does in 5000
optimizer = "muon"
learning_rate = 4e-3
min_lr = 0.0
eval_interval = 250
