"""The version of the whole project. pyproject.toml, records and the command line take it from here."""

__version__ = "0.2.0"
