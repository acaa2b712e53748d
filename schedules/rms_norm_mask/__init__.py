"""rms_norm_mask_int8: norm, TopK mask and INT8 codes, without a list of what is not zero."""
