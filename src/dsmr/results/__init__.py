"""Results: runs, tables by piece, intervals, comparisons, and their tables and plots."""
