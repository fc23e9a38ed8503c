"""Numbers, sizes and times for people; files have the raw numbers."""


def short(number: float) -> str:
    """A number with three digits and a letter.

    >>> short(1_350_000), short(742), short(15_300), short(5.94e18)
    ('1.35M', '742', '15.3k', '5.94e+18')
    """
    if number >= 1e15:  # the FLOPs of a run: papers write them with an exponent
        return f"{number:.3g}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds, as far as they matter.

    >>> duration(192), duration(7384), duration(5.2)
    ('3m12s', '2h03m', '5s')
    """
    minutes, rest = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def size(n_bytes: int) -> str:
    """A number of bytes in decimal units.

    >>> size(2_500_000), size(900)
    ('2.5 MB', '900 B')
    """
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.1f} {unit}"
    return f"{n_bytes} B"
