"""`dsmr benchmark`: compare speed and memory of schedules, baselines and peers."""

import sys

import torch
from lightning.pytorch.cli import LightningArgumentParser

from dsmr import UserError
from dsmr.benchmark.quality import train_and_validate
from dsmr.benchmark.runner import run_benchmark
from dsmr.benchmark.settings import BenchmarkSettings, Workload
from dsmr.cli.common_options import check_output, write_result
from dsmr.cli.estimate_command import precision_of
from dsmr.cli.lightning_cli import SizesCLI
from dsmr.results.tables import benchmark_table

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


class BenchmarkCLI(SizesCLI):
    """The settings of training, and what to compare."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:  # noqa: D102
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(BenchmarkSettings, "benchmark")


def run(command: str, arguments: list[str]) -> int:
    """Run `dsmr benchmark`."""
    cli = BenchmarkCLI(command, arguments)
    output = check_output(cli.config.output)
    trainer, data, model = cli.config.trainer, cli.datamodule, cli.model
    work = Workload(
        settings=cli.config_init.benchmark,
        like=model.backbone,
        num_lanes=data.num_lanes,
        device=place_of(str(trainer.accelerator)),
        precision=precision_of(trainer.precision),
        seed=0 if cli.config.seed_everything is True else int(cli.config.seed_everything or 0),
    )
    limits = {"limit_val_batches": trainer.limit_val_batches}
    result = run_benchmark(
        work,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        train=lambda at, row: train_and_validate(at, row, model, data, limits),
    )
    print("\n".join(benchmark_table(result)))
    print(f"next: dsmr report {output.parent}" if output else "next: the same with --output FILE saves the results")
    write_result(result, as_json=cli.config.json, output=output)
    return 1 if result["wrong"] else 0


def place_of(accelerator: str) -> torch.device:
    """Return the device of a trainer's accelerator."""
    if accelerator not in ACCELERATORS:
        raise UserError(f"trainer.accelerator {accelerator} is not supported; choose from {', '.join(ACCELERATORS)}")
    has_cuda = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not has_cuda:
        raise UserError("trainer.accelerator requires a GPU, but torch finds no CUDA device; use cpu")
    return torch.device("cuda" if has_cuda and accelerator != "cpu" else "cpu")
