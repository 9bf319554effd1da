"""Speed and memory of schedules, baselines and other packages, measured side by side in one process.

Every row trains or decodes the same tokens in the middle of a piece, with a full memory. Rows take turns, so that a
machine that slows down slows all of them; a ratio is the median over the rounds of two rows' ratio within a round.
"""
