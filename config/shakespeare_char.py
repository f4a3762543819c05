# The reference run: 10.7M parameters on Tiny Shakespeare, for one GPU. Not measured on one yet; on two CPU cores with
# --max_iters=2000, validation loss 1.457 (at step 1750) in under three hours. nanoGPT reports 1.4697 for this model.
# Every value equals the default of train.py.
dataset = "shakespeare_char"
out_dir = "out"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # longer memory than the usual 0.95: few tokens in a step make noisy gradients
eval_interval = 250
