# Four heads of size 8 in place of one of 32: several conversations at once, one may look for vowels, another for the
# start of the word. As much arithmetic as before, a clearly lower loss.
_after = "2_self_attention.py"
out_dir = "out/lecture/3_multi_head"

n_head = 4
