"""From MIDI files to batches: lanes of segments.

sources          maestro, folder (folders and zips of MIDI files), synthetic (generated pieces)
tokens           midi -> tokenizer (performance, or any of MidiTok's) -> preparation -> store
batches          lanes or windows (plans of an epoch) -> lane_dataset -> datamodule, the only module with Lightning
"""
