# Deeper: three blocks. Stacked plainly they would train badly; residual connections, x + f(x), give the gradient a
# straight way from the loss to the first layer, and each block need only add to what is there. Lower again.
_after = "4_feed_forward.py"
out_dir = "out/lecture/5_residual"

n_layer = 3
residual = True

learning_rate = 5e-3  # deeper networks want smaller steps
