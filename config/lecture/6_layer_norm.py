# Layer norm before attention, before feed-forward and before the head: each token's channels get mean 0 and variance 1,
# so activations stay in range however deep the network. A little lower at three blocks, indispensable at many.
_after = "5_residual.py"
out_dir = "out/lecture/6_layer_norm"

layer_norm = True
