"""grouped_matmul: the head over a table of 6- or 4-bit codes in groups (schedules/grouped.py)."""
