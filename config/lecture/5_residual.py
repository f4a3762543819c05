# Three blocks deep. Merely stacked, they would train badly; residual connections, x + f(x), give the gradient a direct
# path from the loss to the first layer, and each block only has to add to what is there. 2.13 -> 2.04.
_after = "4_feed_forward.py"
out_dir = "out/lecture/5_residual"

n_layer = 3
residual = True

learning_rate = 5e-3  # 3e-3 ended at 2.11
