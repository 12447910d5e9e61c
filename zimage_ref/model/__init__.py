"""Knows: what Z-Image is: configs, names and shapes of parameters, positions, time and noise, tokens.
May import: errors, formats.
Must never know: how a file is found or named, or how a network is computed.
"""
