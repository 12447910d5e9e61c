"""Knows: a training run without its arithmetic: options, plan, dataset, batches, cache, run folder, events, report.
May import: all of zimage_ref except networks and tiny.
Must never know: how a gradient is computed, or that there is a command line.
"""
