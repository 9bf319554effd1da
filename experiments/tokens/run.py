"""Measure what the `performance` encoding keeps of all pieces of MAESTRO.

    DSMR_MAESTRO=maestro-v3.0.0-midi.zip python experiments/tokens/run.py

Compares decoded music with the notes of every file: lost notes, onset error, tokens per note and second, and whether
encoding the decoded music gives the same tokens. Prints one JSON line.
"""

import json
import os
from pathlib import Path

import numpy as np
from symusic import Score

from dsmr.data.folder import find_source
from dsmr.data.tokenizer import TokenizerSpec, build_tokenizer, decode, encode


def main() -> None:
    source = find_source(Path(os.environ["DSMR_MAESTRO"]), "DSMR_MAESTRO")
    tokenizer = build_tokenizer(TokenizerSpec())
    notes = kept = events = same = 0
    error = seconds = 0.0
    entries = source.entries()
    for entry in entries:
        score = Score.from_midi(source.read(entry.name))
        encoded = encode(tokenizer, score)
        decoded = decode(tokenizer, encoded.ids)
        same += np.array_equal(encode(tokenizer, decoded).ids, encoded.ids)
        played, given = (s.to("second").tracks[0].notes.numpy() for s in (decoded, score))
        order, order_given = (np.lexsort([n["time"], n["pitch"]]) for n in (played, given))
        assert np.array_equal(played["pitch"][order], given["pitch"][order_given]), entry.name
        error += float(np.abs(played["time"][order] - given["time"][order_given]).sum(dtype=np.float64))
        notes += len(given["time"])
        kept += encoded.num_notes
        events += len(encoded.ids) - 2
        seconds += encoded.seconds
    result = {
        "pieces": len(entries),
        "notes": notes,
        "notes_kept": kept,
        "mean_onset_error_ms": 1000 * error / notes,
        "tokens_per_note": events / notes,
        "tokens_per_second": events / seconds,
        "pieces_encoded_alike_after_decoding": int(same),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
