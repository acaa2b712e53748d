"""attention: a step's queries against the packed KV cache."""
