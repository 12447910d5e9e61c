"""Knows: what `zimage doctor` finds: facts about the machine, verdicts, rates, and the model of time.
May import: errors, formats, model, version, checkpoints, memory.
Must never know: mlx, the networks, and how anything is measured.
"""
