"""Judge generated music: compare folders of MIDI files with real pieces."""

from dsmr.analyze.judging.judgement import Judgement, judge_folders

__all__ = ["Judgement", "judge_folders"]
