# Tokens begin to talk: embeddings of what a character is and where it stands, and one head of masked self-attention, by
# which it gathers from those before it. It sees 8 characters now instead of one: the loss falls below the bigrams'.
_after = "1_bigram.py"
out_dir = "out/lecture/2_self_attention"

model = "gpt"
n_layer = 1
n_head = 1
n_embd = 32
feed_forward = False
residual = False
layer_norm = False

learning_rate = 1e-2
