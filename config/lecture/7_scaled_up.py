# The same model, larger: 384 wide, 6 heads, 6 blocks, a context of 256, and dropout, since it could now learn the text
# by heart. For a GPU. Not measured yet; followers of the lecture report 1.48.
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
