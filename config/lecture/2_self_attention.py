# Characters begin to talk: one embedding says what a character is, another where it stands, and one head of masked
# self-attention lets it gather from those before it. It sees up to 8 characters instead of one: 2.49 -> 2.38.
_after = "1_bigram.py"
out_dir = "out/lecture/2_self_attention"

model = "gpt"
n_layer = 1
n_head = 1
n_embd = 32
feed_forward = False
residual = False
layer_norm = False

learning_rate = 1e-2  # 3e-3 ended at 2.44
