# A feed-forward layer after attention: having gathered, each token gets time to think about it. A little lower.
_after = "3_multi_head.py"
out_dir = "out/lecture/4_feed_forward"

feed_forward = True
