"""Depth-Structured Music Recurrence: a recurrent Transformer for whole piano performances.

The way of a batch: `data` (MIDI to lanes of segments) -> `model` (the network and its memory) -> `module` and
`metrics` (training and figures) -> `callbacks` -> `cli`; and back to music through `generate`.
"""
