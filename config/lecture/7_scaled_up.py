# The same model, larger: 384 wide, 6 heads, 6 blocks, a context of 256, and dropout, since it could now learn the text
# by heart. For a GPU; followers of the lecture report 1.48. On two cores of an AMD EPYC (family 26), torch 2.13.0, with
# --max_iters=2000: 1.928 after 500 steps, 1.663, 1.579, and 1.559 in 77 minutes. nanoGPT's recipe: 1.457.
_after = "6_layer_norm.py"
out_dir = "out/lecture/7_scaled_up"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2

learning_rate = 3e-4
eval_interval = 500
dtype = "auto"
