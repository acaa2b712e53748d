"""float_matmul: float32 activations times float16 weights."""
