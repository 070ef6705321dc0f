"""A picture of the numbers of ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_core.errors import ConfigError


def check_plot(path: Path) -> None:
    """Refuse before anything is measured what could not be drawn after it.

    Raises:
        ConfigError: matplotlib is not installed, the name is not that of a PNG file, or its directory is not there.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib; pip install trtllm-core[bench]") from None
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path}: the picture is a PNG file, so its name ends in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no directory {path.parent}")


def plot_rows(found: dict[str, Any], path: Path) -> None:
    """Bars of each row's tokens a second: ours, the peer's, and the limit as a line over ours. Logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, peer = found["rows"], found["peer"]
    figure = Figure(figsize=(max(6.0, 1.2 * len(rows) + 2), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.4 if peer else 0.7
    for index, row in enumerate(rows):
        left = index - (width / 2 if peer else 0)
        axes.bar(left, row["ours"], width, color="#2a6f97", label="trtllm-core" if not index else None)
        if peer:
            axes.bar(index + width / 2, row["peer"], width, color="#a9a9a9", label=peer if not index else None)
        if row["limit"]:
            axes.hlines(row["limit"], left - width / 2, left + width / 2, color="#c1121f", linewidth=2)
            axes.annotate(f"{100 * row['of_limit']:.0f}%", (left, row["limit"]), ha="center", va="bottom", fontsize=8)
    axes.plot([], [], color="#c1121f", linewidth=2, label="limit: memory, of prompts arithmetic")
    axes.set_yscale("log")
    axes.set_ylabel("tokens/s")
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=20, ha="right")
    axes.set_title(f"{found['name']}, {found['dtype']} on {found['device']}, {found['threads']} threads", fontsize=10)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(path)
