"""Knows: which network's weights a file holds: components, dialects, model folders, the hub, conversion.
May import: errors, extras, formats, model.
Must never know: what the weights are used for.
"""
