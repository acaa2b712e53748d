"""rms_norm_topk_int8: the norm whose INT8 codes are masked to the largest, and listed."""
