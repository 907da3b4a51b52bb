"""The folder of a figure: pictures, the tables behind them, and a page with captions."""

from dataclasses import asdict
from pathlib import Path

from mptrain.experiments.captions import caption, other_k_rows, page, point_rows
from mptrain.experiments.figures import FvuByK, XQuantity, save_sweep_figure
from mptrain.experiments.run_hardware import hardware_of
from mptrain.experiments.spec import Experiment, FigurePlan
from mptrain.experiments.tables import write_table
from mptrain.experiments.verdicts import CodersByName, panel_verdicts


def write_figure_folder(
    experiment: Experiment, plan: FigurePlan, coders: CodersByName, fvu_by_k: FvuByK
) -> list[Path]:
    """Write the folder `figures/NAME` of a sweep; gives the paths of its files."""
    sweep_folder = Path(experiment.header.folder)
    folder = sweep_folder / "figures" / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    names = {config.name for config in plan.coders}
    runs = {coder.folder.name for name, coder in coders.items() if name in names}
    machines = hardware_of(sweep_folder, runs)
    x_quantities: tuple[XQuantity, ...] = ("time", "rows")
    if plan.settings.other_k:
        x_quantities = (*x_quantities, "other-k")
    captions = {x: caption(experiment, plan, coders, machines, x) for x in x_quantities}
    files = [
        file
        for x, text in captions.items()
        for file in save_sweep_figure(plan, coders, fvu_by_k, x, text, folder / x)
    ]
    verdicts = [verdict for panel in plan.panels for verdict in panel_verdicts(panel, coders)]
    files += write_table(point_rows(plan, coders), folder / "points")
    files += write_table([asdict(verdict) for verdict in verdicts], folder / "verdicts")
    if plan.settings.other_k:
        files += write_table(other_k_rows(plan, coders, fvu_by_k), folder / "other-k")
    pictures = [(f"{x}.png", text) for x, text in captions.items()]
    (folder / "figure.md").write_text(page(plan, pictures, verdicts))
    return [*files, folder / "figure.md"]
