"""Tuning: choose the values of kernels' knobs by measuring them, and keep what was found."""
