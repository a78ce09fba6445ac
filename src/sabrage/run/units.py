"""Numbers for people: counts, sizes, durations."""


def count(number: float) -> str:
    """A count in three figures: 950, 12.4k, 490k, 143M, 1.24B."""
    for limit, divisor, suffix in ((999.5, 1.0, ""), (999.5e3, 1e3, "k"), (999.5e6, 1e6, "M")):
        if number < limit:
            return _three_figures(number / divisor) + suffix
    return _three_figures(number / 1e9) + "B"


def size(num_bytes: float) -> str:
    """A number of bytes in KiB, MiB, GiB or TiB."""
    value = num_bytes / 2**10
    for unit in ("KiB", "MiB", "GiB"):
        if value < 999.5:
            return f"{_three_figures(value)} {unit}"
        value /= 2**10
    return f"{_three_figures(value)} TiB"


def duration(seconds: float) -> str:
    """A stretch of time: 4.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _three_figures(value: float) -> str:
    if value >= 99.95 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
