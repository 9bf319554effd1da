"""`dsmr analyze`: where each layer looks, what its memory is worth, the schedule that suggests, what memory hears."""

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from tqdm import tqdm

from dsmr import UserError
from dsmr.analyze.ablation import ALL, savings, variants
from dsmr.analyze.distances import AttentionDistances
from dsmr.analyze.memory_plots import clock, plot_distances, plot_heard
from dsmr.analyze.notes import heard, places
from dsmr.analyze.streams import evaluate
from dsmr.analyze.suggest import Horizons, Suggestion, check_budget, half, per_note, suggest
from dsmr.benchmark.machine import current_commit
from dsmr.cli.by_piece import plain
from dsmr.cli.generate_command import check_device
from dsmr.cli.json_output import check_output, write_result
from dsmr.cli.lightning import SizesCLI
from dsmr.data.files import atomic_write
from dsmr.data.midi import read_midi
from dsmr.data.sources import Refused
from dsmr.data.tokenizer import encode
from dsmr.model.backbone import name_of, summary_of
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import TokenRate, format_horizons
from dsmr.results.bootstrap import Comparison, compare_tables, missing_interval_note, ratio_interval
from dsmr.results.piece_table import PIECES_FILE, PieceTable
from dsmr.results.plotting import check_plots
from dsmr.results.run_files import CONFIG_FILE
from dsmr.results.schedule_plots import ScheduleShape, plot_schedules
from dsmr.share.description import check_same_network, describe_network
from dsmr.share.loading import find_checkpoint, load_model

CHOSEN = "chosen on these same pieces"


@dataclass(frozen=True)
class Trained:
    """A run of a suggestion.

    Attributes:
        name: of its folder.
        horizons: it was trained with.
        table: its results by piece.
    """

    name: str
    horizons: Horizons
    table: PieceTable


class AnalyzeCLI(SizesCLI):
    """The run's own configuration; the network's weights come from its checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:  # noqa: D102
        super().add_arguments_to_parser(parser)
        parser.add_argument("--budget", type=int | None, default=None, help="Suggest a schedule with this budget.")
        parser.add_argument(
            "--trained", type=str | None, default=None, help="A run of the suggestion: measured beside predicted."
        )
        parser.add_argument("--piece", type=str | None, default=None, help="A MIDI file: which notes memory foresaw.")
        parser.add_argument("--picture", action="store_true", help="Also pictures.")
        parser.add_argument("--folder", type=str | None, default=None, help="For results; None: RUN/analysis.")
        parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ...; None: cuda if there is.")


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr analyze`."""
    cli = AnalyzeCLI(command, arguments)
    if cli.checkpoint is None:
        raise UserError("dsmr analyze needs a trained model: give --checkpoint RUN")
    settings, output = cli.config, check_output(cli.config.output)
    device = check_device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if settings.picture:
        check_plots()
    if settings.piece is not None and (settings.budget is not None or settings.trained is not None):
        raise UserError("--piece looks at one piece; ask for a --budget in a call of its own")
    if settings.trained is not None and settings.budget is None:
        raise UserError("--trained compares a run with the suggestion; give the --budget of the suggestion")
    loaded = load_model(cli.exported or cli.checkpoint)
    backbone = loaded.backbone.to(device)
    asked = describe_network(cli.model.backbone, None)
    check_same_network(describe_network(backbone, None), asked, horizons_too=True)
    if not isinstance(backbone, Decoder):
        raise UserError(
            f"{name_of(type(backbone))} is not made of dsmr's layers, whose attention is analyzed; derive "
            "the network from dsmr.model.RecurrentTransformer"
        )
    if not any(backbone.horizons):
        raise UserError(
            f"{settings.checkpoint or cli.checkpoint} keeps no memory by layer: there is nothing to analyze"
        )
    if settings.budget is not None:
        check_budget(backbone.horizons, settings.budget, backbone.memory_block)
    trained = None if settings.trained is None else read_trained(settings.trained)
    if settings.piece is None:
        cli.datamodule.pieces("validation")  # refuses data without any before a folder is made
    folder = made(Path(settings.folder) if settings.folder else cli.folder / "analysis")
    print(summary_of(backbone, loaded.rate), flush=True)
    if settings.piece is not None:
        result = one_piece(backbone, cli.datamodule.tokenizer, Path(settings.piece), folder, settings.picture)
    else:
        result = whole_split(cli, backbone, folder, trained, loaded.rate)
    write_result(
        {"checkpoint": str(cli.checkpoint), "commit": current_commit(), **result}, as_json=cli.as_json, output=output
    )
    return 0


def made(folder: Path) -> Path:
    """A folder for results, made where it is not there yet.

    Raises:
        UserError: it is a file, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {folder} cannot be made ({error.strerror or error}); name another") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--folder {folder} cannot be written: no right to write there; name another")
    return folder


def read_trained(given: str) -> Trained:
    """The run that is to be compared with the suggestion.

    Raises:
        UserError: there is none, or it has no results by piece.
    """
    found = find_checkpoint(given)
    folder = found if found.is_dir() else found.parent
    if not (folder / PIECES_FILE).is_file():
        raise UserError(f"--trained {given} has no {PIECES_FILE}; write it with dsmr validate --checkpoint {folder}")
    horizons = load_model(given).backbone.horizons
    return Trained(folder.name, horizons, PieceTable.read(folder / PIECES_FILE))


def whole_split(
    cli: AnalyzeCLI, backbone: Decoder, folder: Path, trained: Trained | None, rate: TokenRate | None
) -> dict[str, Any]:
    """Attention by distance, the worth of every layer's memory, and where asked a suggested schedule."""
    data, settings = cli.datamodule, cli.config
    if data.windows is not None:
        raise UserError("the run was trained on isolated windows, which have no memory: there is nothing to analyze")
    horizons: Horizons = tuple(backbone.horizons)
    watched = AttentionDistances(backbone, max(horizons) + backbone.segment_length)
    names = variants(horizons)
    with tqdm(total=1 + len(names), desc="validation", unit="pass") as bar:

        def score(other: Horizons) -> PieceTable:
            with backbone.remembering(other):
                table = evaluate(backbone, data)
            bar.update()
            return table

        with watched.watching():
            whole = evaluate(backbone, data, watched.watch)
        bar.update()
        tables = {name: score(other) for name, other in names.items()}
        saved = savings(whole, tables)
        found = None
        if settings.budget is not None:
            bar.total = None
            found = suggest(horizons, settings.budget, backbone.memory_block, score)
    result = tell_layers(backbone, watched, saved, whole)
    if settings.picture:
        picture = folder / "attention.png"
        plot_distances(watched.shares(), watched.starts, horizons, backbone.segment_length, picture)
        print(f"  {picture}")
        result["picture"] = str(picture)
    if found is None:
        budget = half(horizons, backbone.memory_block)
        name = shlex.quote(str(cli.exported or cli.folder))
        print(f"next: dsmr analyze --checkpoint {name} --budget {budget} suggests a schedule")
        return result
    result |= tell_suggestion(found, backbone, folder, trained, rate, picture=settings.picture)
    own = "" if cli.exported else f"--config {shlex.quote(str(cli.folder / CONFIG_FILE))} "
    print(f"next: dsmr fit {own}--config {shlex.quote(result['overlay'])} --name suggested-{settings.budget}")
    return result


def tell_layers(
    backbone: Decoder, watched: AttentionDistances, saved: dict[str, Comparison], whole: PieceTable
) -> dict[str, Any]:
    """Print a line for each layer, top to bottom; gives the figures."""
    memory_LH = watched.memory_shares()
    per_piece = f"{len(whole.names)} pieces, {whole.tokens_P.sum():,.0f} tokens"
    print(f"on {per_piece}; nats per note that a layer's memory saves, with 95 % intervals over pieces:")
    layers = []
    for layer in reversed(range(len(backbone.horizons))):
        difference = saved[str(layer)].difference if str(layer) in saved else None
        worth = "no memory" if difference is None else f"{difference:+.4f}"
        share = float(memory_LH[layer].mean())
        print(
            f"  layer {layer:<3} horizon {backbone.horizons[layer]:>7,}  {share:6.1%} of attention to memory  {worth}"
        )
        layers.append(
            {
                "layer": layer,
                "horizon": backbone.horizons[layer],
                "attention_to_memory": memory_LH[layer].tolist(),
                "attention_by_distance": watched.shares()[layer].tolist(),
                "saved": None if difference is None else plain(difference),
            }
        )
    everything = saved[ALL].difference
    print(f"  all layers {everything:+.4f}")
    why = missing_interval_note(one.difference for one in saved.values())
    if why:
        print(f"  ({why})")
    return {
        "pieces": len(whole.names),
        "tokens": int(whole.tokens_P.sum()),
        "nats_per_note": per_note(whole),
        "distances_from": list(watched.starts),
        "layers": layers[::-1],
        "all_layers_saved": plain(everything),
    }


def tell_suggestion(
    found: Suggestion,
    backbone: Decoder,
    folder: Path,
    trained: Trained | None,
    rate: TokenRate | None,
    *,
    picture: bool,
) -> dict[str, Any]:
    """Write the suggestion as a config to train with, and say what it is expected to cost."""
    spelling = format_horizons(found.horizons)
    overlay = folder / f"suggested-{sum(found.horizons)}.yaml"
    predicted, own = per_note(found.predicted), per_note(found.whole)
    lost = compare_tables("suggested", "own", found.predicted, found.whole).difference
    text = (
        f"# Suggested by dsmr analyze for a budget of {sum(found.horizons):,} tokens, from a model trained with\n"
        f"# {format_horizons(found.trained)}: {predicted:.4f} nats per note with these horizons and its own weights,\n"
        f"# {own:.4f} with its own horizons; {CHOSEN}.\n"
        f"model: {{horizons: {spelling}}}\n"
    )
    with atomic_write(overlay) as file:
        file.write(text.encode())
    print(f"suggested for {sum(found.horizons):,} tokens, after {found.num_evaluations} measurements: {spelling}")
    print(
        f"  predicted {predicted:.4f} nats per note (these weights with those horizons, {CHOSEN}), {lost:+.4f} "
        f"against {own:.4f} with its own"
    )
    result: dict[str, Any] = {
        "suggested": spelling,
        "budget": sum(found.horizons),
        "overlay": str(overlay),
        "predicted_nats_per_note": predicted,
        "lost": plain(lost),
        "steps": [{"horizons": format_horizons(h), "nats_per_note": nats} for h, nats in found.steps],
    }
    if picture:
        path = folder / f"suggested-{sum(found.horizons)}.png"
        shapes = {"trained": found.trained, "suggested": found.horizons}
        depths = {n: ScheduleShape(h, backbone.segment_length, backbone.rule, rate) for n, h in shapes.items()}
        plot_schedules(depths, path)
        print(f"  {path}")
    if trained is not None:
        result |= tell_trained(found, trained)
    return result


def tell_trained(found: Suggestion, trained: Trained) -> dict[str, Any]:
    """Compare what was predicted with a run of the suggestion; why they do not compare is a result too."""
    try:
        if trained.horizons != found.horizons:
            own, suggested = format_horizons(trained.horizons) or "no horizons", format_horizons(found.horizons)
            raise UserError(f"{trained.name} was trained with {own}, suggested is {suggested}")
        difference = compare_tables(trained.name, "predicted", trained.table, found.predicted)
    except ValueError as error:
        print(f"  not compared: {error}")
        return {"not_compared": str(error)}
    shared = trained.table.select([name for name in trained.table.names if name in set(found.predicted.names)])
    measured = ratio_interval(shared.nll_P, shared.notes_P)
    print(f"  measured, trained as {trained.name}: {measured} nats per note; {difference}")
    return {"measured": plain(measured), "measured_less_predicted": plain(difference.difference)}


def shortened(name: str, limit: int) -> str:
    """A long name by its ends."""
    half = limit // 2
    return name if len(name) <= limit else f"{name[:half]} ... {name[-half:]}"


def one_piece(backbone: Decoder, tokenizer: Any, path: Path, folder: Path, picture: bool) -> dict[str, Any]:
    """Which notes of a piece memory helped to foresee."""
    try:
        score, _ = read_midi(path.expanduser().read_bytes())
        encoded = encode(tokenizer, score)
    except OSError as error:
        raise UserError(f"--piece {path} cannot be read ({error.strerror or error})") from error
    except Refused as refused:
        raise UserError(f"--piece {path} cannot be used: {refused}") from refused
    if len(encoded.ids) - 1 <= backbone.segment_length:
        raise UserError(
            f"--piece {path} has {len(encoded.ids):,} tokens, which fit into one segment of "
            f"{backbone.segment_length}: nothing has to be remembered; take a longer piece"
        )
    notes = heard(backbone, tokenizer, [int(id_) for id_ in encoded.ids])
    most = places(notes)
    total = float(notes.saved_N.sum())
    print(
        f"{path.name}: {len(notes.pitch_N):,} notes, {total:+.1f} nats saved by memory, "
        f"{total / len(notes.pitch_N):+.3f} per note; the most remembered places:"
    )
    for rank, place in enumerate(most, start=1):
        print(
            f"  {rank:>2}.  {clock(place.start)} to {clock(place.end)}  {place.saved:7.2f} nats in "
            f"{place.num_notes} notes"
        )
    result: dict[str, Any] = {
        "piece": str(path),
        "notes": len(notes.pitch_N),
        "saved": total,
        "places": [asdict(place) for place in most],
        "by_note": {name: part.tolist() for name, part in vars(notes).items()},
    }
    if picture:
        target = folder / f"{path.stem}.png"
        title = f"{shortened(path.stem, 48)}: what memory of {format_horizons(backbone.horizons)} helped to foresee"
        plot_heard(notes, most, target, title=title)
        print(f"next: open {target}")
        result["picture"] = str(target)
    else:
        print("next: the same with --picture draws the notes")
    return result
