"""Pictures of segmentations: contours of label maps on a slice of the image. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

#: Colors of the classes 1, 2, 3, ... (repeated when there are more): distinguishable with color-vision deficiency.
COLORS = ("#e69f00", "#56b4e9", "#f0e442", "#cc79a7", "#009e73", "#d55e00", "#0072b2")


def save_overlay(
    image_slice: np.ndarray,
    masks: Mapping[str, np.ndarray],
    path: Path | str,
    spacing: tuple[float, float] = (1.0, 1.0),
    class_names: Mapping[int, str] | None = None,
    title: str | None = None,
) -> None:
    """Write one PNG: the plain slice, then one panel per mask with the contour of each class.

    Args:
        image_slice: (y, x), any intensity scale; shown between its 0.5 and 99.5 percentile.
        masks: {panel title: label slice (y, x), integers, 0 = background}.
        path: the PNG to write; its folder is created.
        spacing: pixel size in mm (y, x), so that anisotropic slices keep their proportions.
        class_names: {label value: name} for the legend; default "class 1", ...
        title: a line above the panels.

    Raises:
        ValueError: if a mask's shape is not the image's.
    """
    for name, mask in masks.items():
        if mask.shape != image_slice.shape:
            raise ValueError(f"mask {name!r} has shape {mask.shape}, the image slice {image_slice.shape}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no global state, no display
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    values = sorted({int(v) for mask in masks.values() for v in np.unique(mask)} - {0})
    color = {v: COLORS[(v - 1) % len(COLORS)] for v in values}
    height = image_slice.shape[0] * spacing[0] / (image_slice.shape[1] * spacing[1])
    panels = 1 + len(masks)
    figure = Figure(figsize=(2.6 * panels, 2.6 * height + 0.9), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    low, high = np.percentile(image_slice, (0.5, 99.5))
    drawn: list[tuple[str, np.ndarray | None]] = [("image", None), *masks.items()]
    for axis, (name, drawn_mask) in zip(figure.subplots(1, panels, squeeze=False)[0], drawn, strict=True):
        axis.imshow(image_slice, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=spacing[0] / spacing[1])
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
        for value in values if drawn_mask is not None else ():
            if np.any(drawn_mask == value):
                # neighbors share a border, where the later contour hides the earlier one: the tint tells them apart
                axis.contourf(drawn_mask == value, levels=[0.5, 1.5], colors=color[value], alpha=0.25)
                axis.contour(drawn_mask == value, levels=[0.5], colors=color[value], linewidths=1.1)
    if values:
        names = {v: (class_names or {}).get(v, f"class {v}") for v in values}
        handles = [Line2D([], [], color=color[v], label=names[v]) for v in values]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(values), fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(path), dpi=130)


def largest_slice(label: np.ndarray) -> int:
    """Return the index along the first axis of the slice with the most foreground pixels."""
    return int((label > 0).reshape(label.shape[0], -1).sum(1).argmax())
