"""Tokenise a source into a token store, on all cores."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from dsmr import UserError
from dsmr.data.folder import Source
from dsmr.data.midi import read_midi
from dsmr.data.sources import Refused
from dsmr.data.store import TokenStore, new_digest
from dsmr.data.store_writer import StoreWriter, open_or_build
from dsmr.data.tokenizer import Encoded, TokenizerSpec, build_tokenizer, encode
from dsmr.data.tokenizer_settings import tokenizer_source
from dsmr.data.workers import map_in_workers

ENCODING_VERSION = 1
"""Part of a store's key: raise it when the same MIDI files become other tokens."""
Progress = Callable[[int, int], None]
"""Called with (pieces done, pieces in total)."""


def prepare_midi(
    source: Source, spec: TokenizerSpec, cache: Path, *, max_refused_share: float, progress: Progress | None
) -> TokenStore:
    """Open the token store of a source; tokenise the source if the cache does not have it yet.

    Raises:
        UserError: there are no pieces, or a larger share than `max_refused_share` is refused; nothing is stored.
    """
    build_tokenizer(spec)  # refuses a bad spec before any file is read
    entries = source.entries()
    key = store_key(spec, ((e.name, e.split, _content_digest(source, e.name)) for e in entries))

    def build() -> TokenStore:
        with StoreWriter(cache / key, source.description, spec, marks=False) as writer:
            done = map_in_workers(partial(_tokenize, source, spec), [entry.name for entry in entries])
            for count, (entry, result) in enumerate(zip(entries, done, strict=True), start=1):
                if isinstance(result, str):
                    writer.refused[entry.name] = result
                else:
                    writer.add(entry, result)
                if progress:
                    progress(count, len(entries))
            check_refused(writer.refused, len(entries), max_refused_share)
            return writer.finish()

    return open_or_build(cache / key, build)


def check_refused(refused: dict[str, str], total: int, max_share: float) -> None:
    """Raise `UserError` with the first reasons if too many files were refused."""
    if len(refused) > max_share * total or len(refused) == total:
        first = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise UserError(
            f"{len(refused)} of {total} files were refused, more than the allowed share of {max_share:g} "
            f"(data.max_refused_share); nothing was stored. {first}"
        )


def store_key(spec: TokenizerSpec, content: Iterable[tuple[str, ...]]) -> str:
    """Return a store's name: a digest of content, splits, tokenizer settings and library versions.

    For a user's own tokenizer class the digest includes the source of its module.
    """
    digest = hashlib.blake2b(digest_size=12)
    head = (ENCODING_VERSION, version("miditok"), version("symusic"), asdict(spec))
    digest.update(json.dumps(head, sort_keys=True).encode())
    digest.update(tokenizer_source(spec.name).encode())
    for row in content:
        digest.update(json.dumps(row).encode())
    return f"{spec.name}-{digest.hexdigest()}"


def _content_digest(source: Source, name: str) -> str:
    try:
        return new_digest(source.read(name)).hexdigest()
    except Refused as refused:
        return f"refused: {refused}"


def _tokenize(source: Source, spec: TokenizerSpec, name: str) -> Encoded | str:
    tokenizer = build_tokenizer(spec)
    try:
        score, num_unended = read_midi(source.read(name))
        return replace(encode(tokenizer, score), num_unended=num_unended)
    except Refused as refused:
        return str(refused)
    except Exception as error:  # a tokenizer may raise anything; one file never stops the others
        return f"cannot be tokenised: {error!r}"
