"""Draw an evaluation: distance by rank (AR-RAG, Figure 6) beside likelihood by temperature."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from stages.measure.evaluate_tokens import TEMPERATURES, Measured, TokenFigures

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by colour-blind eyes (Okabe and Ito)."""
_INK, _FAINT, _GRID = "#22262b", "#6b7280", "#e6e8eb"
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4)
_STYLES: dict[str, Any] = {"sum": "-", "nearest": (0, (4, 2))}
_DOTTED = (0, (1, 2))


def draw_evaluation(named: Sequence[tuple[str, TokenFigures]], title: str, path: Path) -> None:
    """Write a PNG with a line per index; bands are 95 % intervals. Its folder is created."""
    spaced = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.05)
    figure = Figure(figsize=(11.5, 5.2), dpi=160, layout=spaced, facecolor="white")
    left, right = figure.subplots(1, 2)
    colored = [(_COLORS[n % len(_COLORS)], name, found) for n, (name, found) in enumerate(named)]
    _draw_distances(left, colored)
    _draw_likelihoods(right, colored)
    keys = [Line2D([], [], color=color, linewidth=2, label=name) for color, name, _ in colored]
    keys += [
        Line2D([], [], color=_FAINT, linestyle=style, linewidth=1.9, label=f"merge by {merge}")
        for merge, style in _STYLES.items()
    ]
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=min(len(keys), 6),
        frameon=False,
        fontsize=9.5,
        labelcolor=_INK,
    )
    figure.suptitle(
        f"{title}; bands: 95% intervals", x=0.012, ha="left", fontsize=9.5, color=_FAINT
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def _draw_distances(axes: Any, colored: Sequence[tuple[str, str, TokenFigures]]) -> None:
    """Distance of the k-th retrieved token's code to the true one's, from 0 up."""
    first = colored[0][2]
    for color, _, found in colored:
        _line(axes, range(1, len(found.token_distance) + 1), found.token_distance, color, "-")
    _level(axes, first.random_distance, "a random code", above=True)
    _level(axes, first.prior_distance, "a token of the corpus", above=False)
    title = "Retrieved tokens beside the true one"
    _style(axes, title, "rank k of the retrieved token", "mean L2 distance of codes")
    axes.set_xlim(0, max(len(found.token_distance) for _, _, found in colored) + 1)
    axes.set_ylim(0, 1.15 * max(first.random_distance.mean, first.prior_distance.mean))


def _draw_likelihoods(axes: Any, colored: Sequence[tuple[str, str, TokenFigures]]) -> None:
    """Likelihood of the true token by temperature; a dot, and its value, where it is best."""
    for place, (color, _, found) in enumerate(colored):
        for merge, curve in found.curves.items():
            _line(axes, TEMPERATURES, curve, color, _STYLES[merge])
        points = zip(found.curves["sum"], TEMPERATURES, strict=True)
        best, at = min(points, key=lambda point: point[0].mean)
        axes.plot([at], [best.mean], "o", color=color, markersize=5.5, zorder=4)
        axes.annotate(
            f"best {best.mean:.2f} at τ {at:g}",
            (0.985, 0.04 + 0.055 * (len(colored) - 1 - place)),
            xycoords="axes fraction",
            ha="right",
            fontsize=9,
            color=color,
        )
    _level(axes, colored[0][2].prior_nll, "the corpus prior alone", above=True)
    title = "The true token's likelihood under what is retrieved"
    _style(axes, title, "temperature τ", "negative log likelihood, nats a token")
    axes.set_xscale("log")
    axes.set_xticks(_TICKS, labels=[f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    # Room below the curves for the best values, and above the prior's line for its name.
    axes.set_ylim(low - (high - low) * (0.06 + 0.06 * len(colored)), high + (high - low) * 0.06)


def _line(
    axes: Any, at: Sequence[float], points: Sequence[Measured], color: str, style: Any
) -> None:
    """A line of means with a band of intervals."""
    axes.plot(at, [p.mean for p in points], linestyle=style, color=color, linewidth=1.9, zorder=3)
    low, high = [p.low for p in points], [p.high for p in points]
    axes.fill_between(at, low, high, color=color, alpha=0.1, linewidth=0, zorder=2)


def _level(axes: Any, level: Measured, label: str, *, above: bool) -> None:
    """A horizontal line with its name and value on it."""
    axes.axhline(level.mean, color=_FAINT, linewidth=1.2, linestyle=_DOTTED, zorder=1)
    axes.annotate(
        f"{label}, {level.mean:.2f}",
        (0.985, level.mean),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3 if above else -4),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        fontsize=9,
        color=_FAINT,
    )


def _style(axes: Any, title: str, across: str, up: str) -> None:
    """Few lines, light ones."""
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(up, color=_INK)
    axes.grid(True, color=_GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
