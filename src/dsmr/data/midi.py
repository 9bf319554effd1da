"""A MIDI file as symusic reads it, or the reason why it is not used."""

from symusic import Score

from dsmr.data.errors import Refused
from dsmr.data.strikes import count_strikes

MAX_SECONDS = 4 * 3600
MAX_NOTES = 200_000  # of a piece: eight times the most of MAESTRO, tokenised in half a second


def read_midi(content: bytes) -> tuple[Score, int]:
    """Score of a standard MIDI file, and how many of its notes never end and are left out.

    Raises:
        Refused: symusic cannot read it, or would read other music than it is; or it is too long.
    """
    check_header(content)
    try:
        score = Score.from_midi(content)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise Refused(f"not a MIDI file that symusic can read: {reason}") from error
    if any(tempo.mspq <= 0 for tempo in score.tempos):
        raise Refused("has a tempo of 0")
    num_notes = sum(len(track.notes) for track in score.tracks)
    if num_notes > MAX_NOTES:
        raise Refused(f"has {num_notes:,} notes, more than {MAX_NOTES:,}")
    if not score.to("second").end() <= MAX_SECONDS:
        raise Refused(f"longer than {MAX_SECONDS // 3600} hours")
    return score, max(count_strikes(content) - num_notes, 0)


def check_header(content: bytes) -> None:
    """Refuse what symusic would read as other music than it is.

    Raises:
        Refused: format 2, or no ticks in a beat.
    """
    if content[:4] == b"MThd" and content[8:10] == b"\0\2":
        raise Refused("is of MIDI format 2, whose tracks are pieces of their own")
    if content[:4] == b"MThd" and content[12:14] == b"\0\0":
        raise Refused("has no ticks in a beat")
