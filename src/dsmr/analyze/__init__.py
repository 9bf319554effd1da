"""Measure the worth of memory, and judge generated music.

`analyze_memory` measures each layer, `suggest_horizons` derives a schedule, `analyze_piece` works note by note, and
`judging` compares folders of generated music with real pieces. Their results have `lines()` and `as_dict()`.
"""
