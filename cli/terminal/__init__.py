"""Knows: the terminal: console, signals, options as flags, the choice of an engine.
May import: zimage_ref.
Must never know: which command runs.
"""
