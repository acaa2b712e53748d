"""Pieces that several kernels inline: loops over vectors, rounding, half floats, exp."""
