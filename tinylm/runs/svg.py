"""Line charts as SVG text, for pages that load nothing else.

    values ─▶ thinned ─▶ scale (data -> pixels) ─▶ <polyline>, grid lines, tick labels

Colors are classes (`line-0`, `grid`, `tick`), so that the page's style sheet sets them for light
and dark.
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 8, 44
# More points than pixels cannot be seen.
MAX_POINTS = 600
N_TICKS = 5
# Above the highest and below the lowest point, as a share of their distance.
Y_MARGIN = 0.05

Curve = tuple[str, Sequence[float], Sequence[float]]
"""name, x values, y values"""


def line_chart(curves: Sequence[Curve], *, label: str, x_label: str = "optimizer step") -> str:
    """An `<svg>` with one line per curve over common axes; "" if no curve has a finite value.

    Args:
        label: what a screen reader reads out.
    """
    drawn = []
    for name, xs, ys in curves:
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        if points:
            drawn.append((name, thinned(points)))
    if not drawn:
        return ""
    all_points = [point for _, points in drawn for point in points]
    x_low, x_high = _range([x for x, _ in all_points])
    y_low, y_high = _range([y for _, y in all_points])
    margin = Y_MARGIN * (y_high - y_low)
    y_low, y_high = y_low - margin, y_high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 26}" text-anchor="middle">{tick:g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>'
    )
    for number, (name, points) in enumerate(drawn):
        places = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        last_x, last_y = places[-1]
        parts.append(f'<polyline class="line line-{number}" points="{path}"/>')
        step, value = points[-1]
        title = f"{name}: {value:.6g} at {x_label} {step:g}"
        parts.append(
            f'<circle class="dot-{number}" cx="{last_x:.1f}" cy="{last_y:.1f}" r="3">'
            f"<title>{escape(title)}</title></circle>"
        )
    return "\n".join([*parts, "</svg>"])


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS of the points: of each group its lowest and highest, so that no
    peak is lost, and the first and the last of all.
    """
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = [points[0]]
    for start in range(0, len(points), size):
        group = range(start, min(start + size, len(points)))
        low = min(group, key=lambda i: points[i][1])
        high = max(group, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({low, high})]
    return [*kept, points[-1]]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high, about N_TICKS of them.

    >>> ticks(0.0, 200.0), ticks(2.3, 3.1)
    ([0.0, 50.0, 100.0, 150.0, 200.0], [2.4, 2.6, 2.8, 3.0])
    """
    rough = (high - low) / N_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and highest value, apart even if all are equal."""
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) / 2 or 1.0
    return low - margin, high + margin
