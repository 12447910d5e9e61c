"""Knows: how files store data: tensors, JSON, safetensors, npz, Burnpack, GGUF, quantized matrices.
May import: errors, extras.
Must never know: what a tensor is for, or whose weights these are.
"""
