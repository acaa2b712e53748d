"""rms_norm and its quantising forms: rms_norm_int4, rms_norm_int8, rms_norm_fp4."""
