"""int8_matmul on Zen 4: avx512vnni.py in two streams, and without prefetches.

Measured: EPYC of family 25, model 17, 2 cores, 2026-11-23, 128256 x 2560, cold, ms with one thread
and with two: as on AVX-512 VNNI 21.7, 13.7; without prefetches 17.1, 12.6; four streams 11.6, 11.0;
two 11.7, 10.3; one 11.6, 10.8.
"""

from functools import partial

from schedules.int8_matmul import avx512vnni

KNOBS = {"streams": (2, 4, 1, 8), "prefetch": (0, 512, 2048)}
kernel = partial(avx512vnni.kernel, streams=2, prefetch=0)
