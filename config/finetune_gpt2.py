# Fine-tune GPT-2 (124M parameters, downloaded once from the Hugging Face hub) on Tiny Shakespeare in its tokens.
# Needs pip install transformers. Not measured yet.
dataset = "shakespeare_gpt2"
out_dir = "out/finetune_gpt2"
init_from = "gpt2"

block_size = 1024
dropout = 0.1

batch_size = 32  # 32,768 tokens a step, a tenth of the text
gradient_accumulation_steps = 8
max_iters = 50
optimizer = "adamw"
learning_rate = 1e-4  # low: what GPT-2 knows should bend, not break
min_lr = 0.0
warmup_iters = 5
weight_decay = 0.1
eval_interval = 5
log_interval = 1
