# A feed-forward layer after attention: having gathered, each token gets to think about it. 2.20 -> 2.13.
_after = "3_multi_head.py"
out_dir = "out/lecture/4_feed_forward"

feed_forward = True
