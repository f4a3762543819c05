# A table of bigrams: row i holds the logits of what follows character i, and nothing else is known. Guessing costs
# ln 65 = 4.17; knowing which pairs are common brings the loss to 2.49. On the training text no model that sees only one
# character can get below 2.452, the cross-entropy of the counted pairs.
out_dir = "out/lecture/1_bigram"

model = "bigram"
block_size = 8
batch_size = 32
dropout = 0.0

max_iters = 5000
optimizer = "adamw"
learning_rate = 0.05  # large steps are safe: each row is a problem of its own, and convex
min_lr = 0.0
warmup_iters = 100
weight_decay = 0.03  # keeps pairs that never occurred from becoming impossible
eval_interval = 5000
log_interval = 500
dtype = "float32"  # so small that casting to bfloat16 would cost more time than it saves
