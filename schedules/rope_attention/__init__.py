"""rope_attention: rope, kv_append and attention of a step."""
