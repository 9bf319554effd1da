"""`dsmr analyze`: where each layer attends, what its memory is worth, and the schedule that this suggests."""

import os
import shlex
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from dsmr import UserError
from dsmr.analyze.layers import ablated_horizons, analyze_memory, check_layers
from dsmr.analyze.memory_plots import plot_note_savings
from dsmr.analyze.notes import analyze_piece
from dsmr.analyze.streams import score_pieces
from dsmr.analyze.suggest import (
    SuggestedRun,
    Suggestion,
    check_budget,
    half_budget,
    suggest_horizons,
    verify_suggestion,
)
from dsmr.benchmark.machine import current_commit
from dsmr.cli.common_options import Options, check_device, check_output, write_result
from dsmr.cli.lightning_cli import SizesCLI
from dsmr.data.files import atomic_write
from dsmr.model.backbone import network_summary
from dsmr.model.blocks import Decoder
from dsmr.model.horizons import TokenRate, format_horizons
from dsmr.results.piece_table import PieceTable
from dsmr.results.plotting import check_plots
from dsmr.results.run_files import CONFIG_FILE
from dsmr.results.schedule_plots import ScheduleShape, plot_schedules
from dsmr.share.description import check_same_network, describe_network
from dsmr.share.loading import load_model


class AnalyzeCLI(SizesCLI):
    """The run's own settings; the weights come from its checkpoint."""

    options: ClassVar[Options] = {
        "--split": (str, "validation", "Split to analyze: validation or test."),
        "--budget": (int | None, None, "Suggest a schedule with this budget, in tokens."),
        "--trained": (str | None, None, "Run trained with the suggestion, to compare with the prediction."),
        "--piece": (str | None, None, "MIDI file: report the notes that memory helps to predict, instead of a split."),
        "--folder": (str | None, None, "Folder for plots and the suggested config (default: RUN/analysis)."),
        "--device": (str | None, None, "Device that runs the network: cpu, cuda, ... (default: cuda if available)."),
        "--plot": (None, False, "Also draw plots."),
    }


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr analyze`."""
    cli = AnalyzeCLI(command, arguments)
    if cli.checkpoint is None:
        raise UserError("dsmr analyze needs a trained model: give --checkpoint RUN")
    settings, data, output = cli.config, cli.datamodule, check_output(cli.config.output)
    check_options(settings)
    device = check_device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_model(cli.exported or cli.checkpoint)
    asked = describe_network(cli.model.backbone, None)
    check_same_network(describe_network(loaded.backbone, None), asked, horizons_too=True)
    backbone = check_layers(loaded.backbone.to(device))
    if settings.budget is not None:
        check_budget(backbone.horizons, settings.budget, backbone.memory_block)
    trained = None if settings.trained is None else SuggestedRun.read(settings.trained)
    if settings.piece is None:
        data.pieces(settings.split)  # refuses an empty split before a folder is made
    folder = make_folder(Path(settings.folder) if settings.folder else cli.folder / "analysis")
    print(network_summary(backbone, loaded.rate), flush=True)
    if settings.piece is not None:
        result = report_piece(backbone, data.tokenizer, Path(settings.piece), folder, draw=settings.plot)
    else:
        result = report_split(cli, backbone, folder, trained, loaded.rate)
    result = {"checkpoint": str(cli.checkpoint), "commit": current_commit(), **result}
    write_result(result, as_json=settings.json, output=output)
    return 0


def check_options(settings: Any) -> None:
    """Raise UserError if options contradict each other."""
    if settings.plot:
        check_plots()
    if settings.split not in ("validation", "test"):
        raise UserError(f"--split {settings.split} is not one of validation, test")
    if settings.piece is not None and (settings.budget is not None or settings.trained is not None):
        raise UserError("--piece analyzes one piece; ask for a --budget in a call of its own")
    if settings.trained is not None and settings.budget is None:
        raise UserError("--trained compares a run with the suggestion; give the --budget of the suggestion")
    if settings.budget is not None and settings.split == "test":
        raise UserError("--budget chooses horizons, which test pieces must not decide; leave out --split test")


def make_folder(folder: Path) -> Path:
    """Create the folder for results; raise UserError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {folder} cannot be made ({error.strerror or error}); name another") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--folder {folder} cannot be written: no permission; name another")
    return folder


def report_split(
    cli: AnalyzeCLI, backbone: Decoder, folder: Path, trained: SuggestedRun | None, rate: TokenRate | None
) -> dict[str, Any]:
    """Analyze the memory of each layer on a split, and suggest a schedule if a budget is given."""
    data, settings, block = cli.datamodule, cli.config, backbone.memory_block
    num_passes = 1 + len(ablated_horizons(backbone.horizons))
    with tqdm(total=None if settings.budget else num_passes, desc=settings.split, unit="pass") as bar:
        report = analyze_memory(backbone, data, split=settings.split, on_pass=bar.update)

        def score(horizons: tuple[int, ...]) -> PieceTable:
            bar.update()
            return score_pieces(backbone, data, horizons=horizons)

        suggestion = None
        if settings.budget is not None:
            suggestion = suggest_horizons(backbone.horizons, settings.budget, block, score)
    print("\n".join(report.lines()))
    result = report.as_dict()
    if settings.plot:
        report.plot(folder / "attention.png")
        print(f"  {folder / 'attention.png'}")
        result["picture"] = str(folder / "attention.png")
    if suggestion is None:
        run, budget = shlex.quote(str(cli.exported or cli.folder)), half_budget(backbone.horizons, block)
        print(f"next: dsmr analyze --checkpoint {run} --budget {budget} suggests a schedule")
        return result
    result |= report_suggestion(suggestion, backbone, folder, trained, rate, draw=settings.plot)
    own = "" if cli.exported else f"--config {shlex.quote(str(cli.folder / CONFIG_FILE))} "
    print(f"next: dsmr fit {own}--config {shlex.quote(result['overlay'])} --name suggested-{settings.budget}")
    return result


def report_suggestion(
    suggestion: Suggestion,
    backbone: Decoder,
    folder: Path,
    trained: SuggestedRun | None,
    rate: TokenRate | None,
    *,
    draw: bool,
) -> dict[str, Any]:
    """Write a suggestion as a config, and compare it with a run trained with it if one is given."""
    overlay = folder / f"suggested-{suggestion.budget}.yaml"
    with atomic_write(overlay) as file:
        file.write(suggestion.overlay().encode())
    print("\n".join(suggestion.lines()))
    result = suggestion.as_dict() | {"overlay": str(overlay)}
    if draw:
        both = {"trained": suggestion.trained, "suggested": suggestion.horizons}
        shapes = {name: ScheduleShape(h, backbone.segment_length, backbone.rule, rate) for name, h in both.items()}
        plot_schedules(shapes, overlay.with_suffix(".png"))
        print(f"  {overlay.with_suffix('.png')}")
    if trained is not None:
        verification = verify_suggestion(suggestion, trained)
        print("\n".join(verification.lines()))
        result |= verification.as_dict()
    return result


def report_piece(backbone: Decoder, tokenizer: Any, path: Path, folder: Path, *, draw: bool) -> dict[str, Any]:
    """Report the notes of a piece that memory helps to predict."""
    report = analyze_piece(backbone, tokenizer, path)
    print("\n".join(report.lines()))
    if not draw:
        print("next: the same with --plot draws the notes")
        return report.as_dict()
    target = folder / f"{path.stem}.png"
    name = path.stem if len(path.stem) <= 48 else f"{path.stem[:24]} ... {path.stem[-24:]}"
    title = f"{name}: nats saved by the memory of {format_horizons(backbone.horizons)}"
    plot_note_savings(report.notes, report.passages, target, title=title)
    print(f"next: open {target}")
    return report.as_dict() | {"picture": str(target)}
