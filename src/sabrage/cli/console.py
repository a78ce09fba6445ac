"""Lines for the person at the terminal."""

from rich.console import Console


def say(text: str, *, markup: bool = True) -> None:
    """Prints one message; markup is rich's, and generated text goes without."""
    Console(soft_wrap=True, highlight=False).print(text, markup=markup)
