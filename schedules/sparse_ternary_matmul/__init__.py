"""sparse_ternary_matmul: only the weight columns of non-zero activations, plus the residual."""
