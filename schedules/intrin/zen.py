"""How AMD's Zen is asked for memory: into L2, and for each line several times on the way to it.

On Zen 4 `prefetcht1` fills L2. Where too many lines are on their way it is dropped: a loop of
nothing else passes 180 GB/s on a core that reads 30. So a line is asked for as far ahead as the
kernel says, and again at three quarters, half and a quarter of that; one on its way by then costs
an instruction.

Measured: EPYC of family 25, model 17, 2 cores, 2026-11-23, rows of 640 bytes, a third of 6912,
cold, in C, us with one thread and with two: no prefetch 225, 147; once 146, 107; twice 120, 90;
three times 105, 84; four times 95, 84. In the kernels: ternary_matmul/zen4.py, zen.py and others.
"""

from schedules.intrin.lanes import prefetches_into_l2

prefetching = prefetches_into_l2(times=4)  # a decorator of a kernel's factory
