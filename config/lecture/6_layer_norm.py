# Pre-norm: a layer norm before attention, before feed-forward and before the head brings the channels of each token to
# mean 0 and variance 1: activations stay in range however deep the network. 2.04 -> 2.00; deeper ones depend on it.
_after = "5_residual.py"
out_dir = "out/lecture/6_layer_norm"

layer_norm = True
