"""Knows: checks of the device against NumPy, and measurements of its speed, on the networks as they are run.
May import: device, networks, lora, training and pipeline of zimage_mlx; formats, model, networks, doctor of zimage_ref.
Must never know: the terminal.
"""
