"""kv_append: keys and values of a step quantised, packed and stored in the cache."""
