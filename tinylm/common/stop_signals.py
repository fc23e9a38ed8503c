"""The signals that ask a program to stop."""

import signal

_NAMES = (
    "SIGINT",  # Ctrl-C
    "SIGTERM",  # kill, and most schedulers
    "SIGHUP",  # the terminal was closed, or the ssh connection was lost
    "SIGUSR1",  # SLURM's --signal, submitit: the time limit is near
    "SIGUSR2",
    "SIGXCPU",  # the limit of CPU time is reached
)
# A platform may lack some: Windows has only the first two.
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


def signal_name(number: int) -> str:
    """The name of a signal for people.

    >>> signal_name(signal.SIGINT), signal_name(signal.SIGTERM)
    ('Ctrl-C', 'SIGTERM')
    """
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def handled_signals() -> list[signal.Signals]:
    """The stop signals that are not ignored: nohup ignores SIGHUP,
    a background shell ignores SIGINT.
    """
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
