# A table of bigrams: row i holds the logits of what follows character i, and nothing else is known. Guessing costs
# ln 65 = 4.17; which pairs are common brings the loss to 2.5, and no model that sees one character gets lower.
out_dir = "out/lecture/1_bigram"

model = "bigram"
block_size = 8
batch_size = 32
dropout = 0.0

max_iters = 5000
learning_rate = 0.05  # a table can take large steps: no weight depends on another row's
min_lr = 0.0
weight_decay = 0.03  # keeps pairs that never occurred from becoming impossible
eval_interval = 5000
log_interval = 500
dtype = "float32"  # so small that rounding would cost time, not save it
