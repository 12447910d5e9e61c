"""Knows: the twins of zimage_ref/networks on MLX, under the same names, and how their blocks are run.
May import: device, and formats and model of zimage_ref.
Must never know: zimage_ref/networks, LoRAs, and the loops that call the networks.
"""
