"""What memory is worth, and how generated music compares with real music.

`analyze_memory` measures each layer, `suggest_horizons` derives a schedule, `analyze_piece` works note by note, and
`judging` compares folders of generated music with real pieces. Their results have `lines()` and `as_dict()`.
"""
