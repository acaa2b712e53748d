"""ternary_matmul and ternary_glu_matmul: quantised activations times packed ternary weights."""
