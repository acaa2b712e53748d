"""Kernels: one PrimFunc for an op's static shape and a machine, and the weight layout it reads.

`schedules/<op>/<family>.py` holds one op for one family of machines. Families a machine
accepts, in order of preference, stand in its row of `schedules/targets.py`.
"""
