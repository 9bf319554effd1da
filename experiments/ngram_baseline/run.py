"""Compute the perplexity of an interpolated trigram, the least that a model must beat.

Counts come from the training split, interpolation weights from expectation maximization on every 20th training piece,
which is left out of the counts. Every token except BOS is predicted, as in `dsmr validate`.

    python experiments/ngram_baseline/run.py --config laptop

Takes the data of a config (here every 8th official validation piece of MAESTRO) and prints one JSON line.
"""

import json
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dsmr.cli.prepare_command import PrepareCLI
from dsmr.data.datamodule import MusicData

HELD_OUT_STRIDE = 20
EM_STEPS = 30


def streams(data: MusicData, numbers: Iterable[int]) -> list[NDArray[np.int64]]:
    """Return the ids of the pieces, each with a second BOS, so that every token has two tokens before it."""
    pieces = [data.store.pieces[number] for number in numbers]
    return [
        np.concatenate([[1], data.store.tokens[piece.start : piece.start + piece.length]]).astype(np.int64)
        for piece in pieces
    ]


def trigrams(pieces: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return all trigrams (N, 3) of the pieces; none spans two pieces."""
    return np.concatenate([np.lib.stride_tricks.sliding_window_view(ids, 3) for ids in pieces])


class Counts:
    """Relative frequencies of a token given none, one and two tokens before it."""

    def __init__(self, seen_N3: NDArray[np.int64], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        keys = [self._keys(seen_N3[:, start:]) for start in (2, 1, 0)]
        self.tables = [np.unique(key, return_counts=True) for key in keys]
        self.contexts = [np.unique(key // vocab_size, return_counts=True) for key in keys]

    def _keys(self, tokens_NK: NDArray[np.int64]) -> NDArray[np.int64]:
        weights = self.vocab_size ** np.arange(tokens_NK.shape[1])[::-1]
        return tokens_NK @ weights

    def probabilities(self, tokens_N3: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the uniform, unigram, bigram and trigram probability (N, 4) of each last token."""
        columns = [np.full(len(tokens_N3), 1 / self.vocab_size)]
        for start, table, contexts in zip((2, 1, 0), self.tables, self.contexts, strict=True):
            key = self._keys(tokens_N3[:, start:])
            seen, total = lookup(table, key), lookup(contexts, key // self.vocab_size)
            columns.append(np.divide(seen, total, out=np.zeros(len(key)), where=total > 0))
        return np.stack(columns, axis=1)


def lookup(table: tuple[NDArray[np.int64], NDArray[np.int64]], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the counts of the keys, 0 for a key that never occurred."""
    known, counts = table
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, counts[places], 0)


def main() -> None:
    data = PrepareCLI("prepare", sys.argv[1:]).datamodule
    train = data.pieces("train")
    held_out = set(train[::HELD_OUT_STRIDE])
    counts = Counts(trigrams(streams(data, [n for n in train if n not in held_out])), data.vocab_size)
    tuning_N4 = counts.probabilities(trigrams(streams(data, sorted(held_out))))
    weights = np.full(4, 0.25)
    for _ in range(EM_STEPS):
        shares_N4 = tuning_N4 * weights
        weights = (shares_N4 / shares_N4.sum(axis=1, keepdims=True)).mean(axis=0)
    numbers = data.pieces("validation")
    nll = -np.log(counts.probabilities(trigrams(streams(data, numbers))) @ weights)
    notes = sum(data.store.pieces[number].num_notes for number in numbers)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "perplexity": float(np.exp(nll.mean())),
        "nats_per_note": float(nll.sum() / notes),
        "tokens": len(nll),
        "pieces": len(numbers),
        "weights": [round(float(weight), 4) for weight in weights],
        "data": data.store.description.rpartition("/")[2],
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
