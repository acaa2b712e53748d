"""rope: rotary position embedding of queries and keys."""
