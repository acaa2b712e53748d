"""glu_matmul: gate and up projection of a prompt at once."""
