"""norm_matmul and its kin: a norm, its quantiser and the matmul behind it, for one row."""
