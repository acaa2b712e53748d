"""grouped_matmul on Zen 4: avx512vnni.py in two streams, and without prefetches.

Measured: EPYC of family 25, model 17, 2 cores, 2026-11-23, 128256 x 2560 at 6 bits, cold, GB/s with
one thread and with two: as on AVX-512 VNNI 18.2, 26.0; without prefetches 21.1, 29.0; four streams
26.7, 31.4; two 29.9, 31.3; one 29.1, 32.3.
"""

from functools import partial

from schedules.grouped_matmul import avx512vnni

KNOBS = {"streams": (2, 4, 1, 8), "prefetch": (0, 512, 2048)}
kernel = partial(avx512vnni.kernel, streams=2, prefetch=0)
