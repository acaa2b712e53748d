"""rope_matmul: a prompt's projection of queries, keys and values, heads turned."""
