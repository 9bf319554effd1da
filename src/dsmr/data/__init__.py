"""From MIDI to lanes of segments.

`maestro`, `folder`, `synthetic` (where pieces come from) -> `tokenizer` -> `store` (ids on disk) -> `lanes`
(batch rows that stream pieces) -> `datamodule` (the only file here that knows Lightning).
"""
