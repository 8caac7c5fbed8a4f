"""intentd: daemons that take the intent and learn the knobs."""

__version__ = "0.1.0"
