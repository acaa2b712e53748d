"""int8_matmul: the language model's head, int8 activations times a row-major int8 table."""
