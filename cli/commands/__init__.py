"""Knows: one command a file: its options, and what it does with them.
May import: terminal, zimage_ref.
Must never know: mlx, numpy, and how anything is computed.
"""
