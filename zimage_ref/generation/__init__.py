"""Knows: the way from a prompt to a picture, for any engine: options, plan, samplers, loop, record, run.
May import: all of zimage_ref except networks, training and tiny.
Must never know: which engine computes, or that there is a command line.
"""
