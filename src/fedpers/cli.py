"""The command line."""

from __future__ import annotations

import math
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fedpers import personalize_cli, report_cli
from fedpers.data_cli import app as data_app
from fedpers.errors import FedpersError
from fedpers.models.assets_cli import app as assets_app
from fedpers.sweep_cli import sweep

if TYPE_CHECKING:
    from fedpers.config import Config

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    help="Private federated personalization of language models, simulated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
privacy_app = typer.Typer(help="Look at privacy before training.", no_args_is_help=True)
app.add_typer(privacy_app, name="privacy")
app.add_typer(assets_app, name="assets")
app.add_typer(data_app, name="data")

ConfigPath = Annotated[Path, typer.Argument(help="A YAML file; see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to it, such as privacy.epsilon=2 method=fedrep.", show_default=False)
]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/NAME, numbered if taken.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    track: Annotated[
        list[str] | None, typer.Option(help="Also to csv, mlflow, tensorboard or wandb; may be repeated.")
    ] = None,
) -> None:
    """Run a simulation and print who gains, the claim, and where the figures are.

    CONFIG is a YAML file, see configs/; OVERRIDES are changes to it: fedpers run configs/quickstart.yaml rounds=3
    """
    from fedpers.reporting import reporter
    from fedpers.run_place import place_of_run
    from fedpers.tracking import check_names

    check_names(track or ())
    settings = _settings(config, overrides)
    place_of_run(out, settings.name, resume)
    try:
        from fedpers.simulation import simulate

        with closing(reporter(Console(stderr=True), quiet)) as progress:
            found = simulate(settings, out, resume=resume, reporter=progress, track=track or ())
    except KeyboardInterrupt:
        typer.echo("fedpers: stopped; continue with the same command and --resume.", err=True)
        raise typer.Exit(130) from None
    _print_run(found)


@app.command()
def methods(
    guarantees: Annotated[
        bool, typer.Option("--guarantees", help="Who is protected from whom, and which methods are allowed.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown.")] = False,
) -> None:
    """List the methods, or what they can promise to whom."""
    from fedpers.registry import names

    if guarantees:
        _print_guarantees(names("methods"), markdown)
        return
    from fedpers import listing

    if markdown:
        typer.echo(listing.markdown(names("methods")), nl=False)
    else:
        Console().print(listing.table(names("methods")))


@privacy_app.command("plan")
def privacy_plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print noise multiplier and noise against signal, before any training."""
    settings = _settings(config, overrides)
    from fedpers.experiment import prepare, shared_sizes
    from fedpers.privacy.planned import plan_notes, plan_table

    experiment = prepare(settings)
    guarantee = experiment.guarantee
    out = Console()
    if not guarantee.noise_multiplier:
        out.print(_why_no_noise(experiment), highlight=False)
        return
    out.print(
        f"unit {guarantee.unit}, trust {guarantee.trust}, adjacency {guarantee.adjacency}\n"
        f"target epsilon {experiment.config.privacy.epsilon:g}, delta {guarantee.delta:g}; noise multiplier "
        f"{guarantee.noise_multiplier:.4f}, clip {guarantee.clip}, {_credited(guarantee)}, "
        f"{guarantee.releases} noised steps, divided by {guarantee.denominator:g}\n"
        f"personal state: {guarantee.head_policy}",
        highlight=False,
    )
    for line in plan_notes(guarantee, experiment.config):
        out.print(line, highlight=False)
    table = Table("shared group", "numbers", "noise norm / clip", "noise norm / largest possible mean")
    for row in plan_table(guarantee, shared_sizes(experiment)):
        table.add_row(
            str(row["group"]), str(row["numbers"]), f"{row['noise_over_clip']:.3f}", f"{row['noise_over_best']:.3f}"
        )
    out.print(table)
    out.print("This is a plan. The claim of a run is computed from its ledger.", highlight=False)


@app.command()
def audit(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="A new directory; by default runs/NAME-audit, numbered.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Only check the mechanism; trains next to nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Attack the claim: checks, canaries, membership, inversion; exit code 1 if it is found to be false."""
    from fedpers.reporting import reporter
    from fedpers.run_place import check_empty, free_directory

    settings = _settings(config, overrides)
    place = out or free_directory(f"{settings.name}-audit")
    check_empty(place)
    from fedpers.audit.command import audit as run_audit
    from fedpers.audit.command import print_audit

    with closing(reporter(Console(stderr=True), quiet)) as progress:
        found = run_audit(settings, place, probe_only=probe, reporter=progress)
    print_audit(found, place, Console())
    if found.violations:
        raise typer.Exit(1)


@app.command()
def export(
    run_directory: Annotated[Path, typer.Argument(help="A finished run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new directory.", show_default=False)],
    public: Annotated[
        bool, typer.Option("--public", help="Leave out everything private (the only kind so far).")
    ] = False,
) -> None:
    """Copy what may be shown to others: shared adapter, claim, ledger, configuration."""
    from fedpers.errors import RunDirectoryError
    from fedpers.public import export_public

    if not public:
        raise RunDirectoryError("export: say --public; copying private state is not what export is for.")
    for name in export_public(run_directory, out):
        typer.echo(out / name)


for command in (sweep, *report_cli.COMMANDS, *personalize_cli.COMMANDS):
    app.command()(command)


def _settings(config: Path, overrides: list[str] | None) -> Config:
    """Read a configuration and look for what it names, before torch is imported: a mistake is answered at once."""
    from fedpers.config import load_config
    from fedpers.registry import check_named

    settings = load_config(config, overrides or [])
    check_named(settings)
    return settings


def _print_guarantees(known: list[str], markdown: bool) -> None:
    from fedpers import guarantees
    from fedpers.methods.base import Method
    from fedpers.registry import broken

    if failed := broken("methods", Method):  # one cannot be used; the others can all the same
        for name, error in failed.items():
            Console(stderr=True).print(f"{name} cannot be used: {error}", markup=False, soft_wrap=True)
        known = [name for name in known if name not in failed]
    modes = guarantees.guarantees(known)
    if markdown:
        typer.echo(guarantees.markdown(modes, known), nl=False)
    else:
        Console().print(guarantees.table(modes, known))


def _print_run(found: Any) -> None:
    out = Console()
    summary = found.summary
    table = Table(
        "model",
        summary["metric"],
        "95% interval",
        "worst decile",
        title=f"{summary['name']}: {summary['method']}",
        box=SIMPLE,
    )
    for kind, one in summary["metrics"].items():
        worst = "" if one["worst_decile"] is None else f"{one['worst_decile']:.3f}"
        table.add_row(kind, f"{one['mean']:.3f}", f"{one['ci95'][0]:.3f} to {one['ci95'][1]:.3f}", worst)
    out.print(table)
    versus = Table(box=SIMPLE)
    for column in ("own vs", "gain (95% interval)", "help/tie/harm", "by chance", "p"):
        versus.add_column(column, no_wrap=True)  # fits 80 columns
    for kind, one in summary["comparisons"].items():
        chance = one["null_helped"]
        versus.add_row(
            kind,
            f"{one['mean_gain']:+.3f} ({one['ci95'][0]:+.3f}, {one['ci95'][1]:+.3f})",
            f"{one['helped']:g}/{one['tied']:g}/{one['harmed']:g}" if one["n_eligible"] else "nobody",
            "" if chance is None else f"{chance['low']:g} to {chance['high']:g}",
            f"{one['p_value']:.1g}",
        )
    out.print(versus)
    forecast = found.forecast.sentence if found.forecast else ""
    for line in (summary["reading"], found.claim.sentence, forecast, _noise_line(summary)):
        if line:
            out.print(line + "\n", highlight=False, markup=False)
    for path in sorted((found.path / "figures").glob("*.png")):
        out.print(f"figure: {path}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"run directory: {found.path}", highlight=False, markup=False, soft_wrap=True)


def _credited(guarantee: Any) -> str:
    if guarantee.amplification == "none":
        return "no amplification by sampling"
    return f"{guarantee.amplification} sampled with rate {guarantee.rate:g}"


def _why_no_noise(experiment: Any) -> str:
    privacy, guarantee = experiment.config.privacy, experiment.guarantee
    if not experiment.plan.shared or not experiment.config.rounds:
        return f"No noise: method {experiment.plan.name!r} releases nothing here, so epsilon is 0."
    cause = "privacy.unit is none" if guarantee.unit == "none" else f"privacy.epsilon is {privacy.epsilon:g}"
    clip = "" if guarantee.clip is None else f" Contributions are clipped to {guarantee.clip:g}; that alone is none."
    return f"No noise: {cause}, so nothing bounds what the releases tell; no privacy guarantee.{clip}"


def _noise_line(summary: dict[str, Any]) -> str:
    ratios = summary["noise_to_update"]
    if not any(ratio > 0 for ratio in ratios.values()) or any(math.isnan(r) for r in ratios.values()):
        return ""
    shown = ", ".join(f"{group} {ratio:.2f}" for group, ratio in ratios.items())
    return f"Noise over mean update, median over rounds: {shown}."


def main() -> None:
    """Run the command line: exit code 2 and one line for what a user can mend, 130 for Ctrl-C."""
    try:
        app(standalone_mode=True)
    except FedpersError as error:
        print(f"fedpers: {error}", file=sys.stderr)
        sys.exit(2)
