"""Every shipped overlay at base.yaml's depth, and the experiments that are made of them."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from conftest import experiment
from dsmr.benchmark.variants import VARIANTS
from dsmr.cli.config_files import SWEEPS, shipped
from dsmr.cli.lightning_cli import DsmrCLI
from dsmr.cli.sweep.spec import make_trials, read_sweep, shipped_sweeps
from dsmr.model import RecurrentTransformer
from dsmr.results.schedule_plots import ScheduleShape, plot_schedules

OVERLAYS = [name for name in shipped() if name.startswith(("horizons/", "backbone/", "data/"))]
BUDGET = 12_288
OTHER_BUDGETS = {"full": 49_152, "two_scale_whole": 49_152, "memoryless": 0, "windowed": 0, "perceiver_ar": 0}


def narrow(name: str, tmp_path: Path) -> DsmrCLI:
    """An overlay over base.yaml, 12 layers deep but 16 wide, on generated pieces, segments of 128 tokens."""
    sizes = {"d_model": 16, "num_layers": 12, "num_heads": 2, "init_std": 0.3, "dropout": 0.0}
    options = [f"--model.backbone.{key}={value}" for key, value in sizes.items()]
    options += ["--data.recall.num_train=4", "--data.recall.num_validation=2", "--data.num_lanes=2"]
    options += ["--data.segment_length=128", "--data.transpose=0", f"--root={tmp_path}"]
    options += ["--trainer.fast_dev_run=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    if name == "data/windowed":
        options += ["--data.windows.stride=64"]
    return DsmrCLI("fit", ["--config", name, *options])


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_trains_validates_and_decodes_as_it_trains(name: str, tmp_path: Path) -> None:
    cli = narrow(name, tmp_path)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert torch.isfinite(cli.trainer.callback_metrics["val/perplexity"])
    network = cli.model.backbone.double().eval()
    assert len(network.blocks) == 12
    tokens_BN = torch.randint(0, 392, (1, 288), generator=torch.Generator().manual_seed(0))
    streamed, decoded = [], []
    with torch.inference_mode():
        for part_length, logits in ((128, streamed), (1, decoded)):
            memory = network.init_memory(1, decoding=True)
            for part_BT in tokens_BN.split(part_length, dim=1):
                out_BTV, update = network(part_BT, memory)
                memory.commit(update)
                logits.append(out_BTV)
    torch.testing.assert_close(torch.cat(decoded, 1), torch.cat(streamed, 1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_its_budget_at_base_size_and_as_many_parameters_as_all(name: str) -> None:
    with torch.device("meta"):
        cli = DsmrCLI("fit", ["--config", name, "--trainer.logger=false"])
    network = cli.model.backbone
    assert sum(network.horizons) == OTHER_BUDGETS.get(name.partition("/")[2], BUDGET)
    assert sum(p.numel() for p in network.parameters()) == 38_748_672
    assert cli.datamodule.num_lanes * cli.datamodule.segment_length == 4096, "other tokens per step"
    assert network.rule == ("sliding" if name.endswith("sliding") else "boundary")
    if isinstance(network, RecurrentTransformer) and network.horizons:
        assert network.state_bytes(8, 4) == 2 * 4 * 8 * 512 * sum(network.horizons)


def test_every_overlay_is_a_variant_and_every_variant_has_its_overlay() -> None:
    assert sorted(variant.overlay for variant in VARIANTS.values()) == sorted(OVERLAYS)
    for name, variant in VARIANTS.items():
        assert variant.overlay.rpartition("/")[2] == name
        assert shipped()[variant.overlay].read_text(encoding="utf-8").startswith("# ")
    assert [name for name, variant in VARIANTS.items() if variant.published] == [
        *("full", "perceiver_ar", "two_scale", "binary_sliding", "ascending")
    ]
    assert "2x22016+10x512" in shipped()["horizons/two_scale_whole"].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_the_tables_of_the_readmes_have_every_variant(page: str) -> None:
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    missing = [name for name in VARIANTS if f"`{name}`" not in text and f"--config {name}`" not in text]
    assert not missing


def test_every_experiment_has_its_report_whose_links_and_scripts_exist() -> None:
    root = Path(__file__).parent.parent
    experiments = root / "experiments"
    assert {path.name for path in experiments.iterdir() if path.is_file()} == {"README.md", "LOG.md"}
    folders = [path for path in experiments.iterdir() if path.is_dir() and path.name != "__pycache__"]
    pages = [root / "README.md", root / "docs" / "guide.md"]
    pages += [experiments / "README.md", experiments / "LOG.md", *(folder / "README.md" for folder in folders)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#:]+)", text)
        assert [link for link in links if link != "https" and not (page.parent / link).exists()] == [], page
        scripts = re.findall(r"python3? ((?:experiments|tests)/[a-z_/]+\.py)", text)
        assert [script for script in scripts if not (root / script).is_file()] == [], page
        sweeps = re.findall(r"dsmr sweep ([a-z_]+)", text)
        assert set(sweeps) <= set(shipped_sweeps()), page


def test_the_papers_table_as_a_sweep_is_the_registry_and_its_commands_parse(tmp_path: Path) -> None:
    sweep = yaml.safe_load((SWEEPS / "paper_table.yaml").read_text(encoding="utf-8"))
    names = sweep["parameters"]["config"]["values"]
    assert names == list(VARIANTS)
    assert sweep["command"][:2] == ["dsmr", "fit"]
    for name in names:
        trial = {"args": {key: {"value": name if key == "config" else v["value"]} for key, v in parameters(sweep)}}
        filled = create_sweep_command_args(trial)["args"]
        arguments = [part for word in sweep["command"][2:] for part in (filled if word == "${args}" else [word])]
        arguments += ["--trainer.logger=false", f"--root={tmp_path}"]
        with torch.device("meta"):
            assert DsmrCLI("fit", arguments).config.seed_everything == 0


def parameters(sweep: dict) -> list[tuple[str, dict]]:
    return list(sweep["parameters"].items())


def test_the_miniatures_of_all_variants_have_one_budget_and_equal_steps(tmp_path: Path) -> None:
    variants = experiment("variants")
    recorded = json.loads((Path(variants.__file__).parent / "results.json").read_text(encoding="utf-8"))
    for kind, miniature in variants.MINIATURES.items():
        sweep = read_sweep(miniature.write_sweep(kind, list(VARIANTS), tmp_path))
        trials = make_trials(sweep)
        assert [trial.name for trial in trials] == list(VARIANTS)
        for trial in trials:
            cli = DsmrCLI("fit", list(trial.arguments))
            network, data = cli.model.backbone, cli.datamodule
            expected = {"full": 64, "two_scale_whole": 64, "memoryless": 0, "windowed": 0, "perceiver_ar": 0}
            assert sum(network.horizons) == expected.get(trial.name, 16) * miniature.sizes.block, (kind, trial.name)
            assert list(network.horizons) == recorded[kind][trial.name]["horizons"]
            assert network.rule == ("sliding" if trial.name == "binary_sliding" else "boundary")
            assert data.num_lanes * data.segment_length == {"recall": 2048, "maestro": 1024}[kind]
            assert len(network.blocks) == 4
            assert network.settings.d_model == {"recall": 64, "maestro": 128}[kind]


def test_plots_are_written_and_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths = {"one": ScheduleShape((256, 64), 64), "two": ScheduleShape((0, 128), 64, "sliding")}
    plot_schedules(depths, tmp_path / "schedules.svg")
    experiment("variants").plot_recall({"one": {64: 1.0, 128: 16.0}}, {"one": (64, 128)}, 16, tmp_path / "recall.png")
    assert "receptive field" in (tmp_path / "schedules.svg").read_text()
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"dsmr\[app\]"):
        plot_schedules(depths, tmp_path / "other.svg")
