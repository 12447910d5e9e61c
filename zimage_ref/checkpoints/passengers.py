"""Tensors that other programs leave in a file, and that no network of Z-Image uses. They are ignored and counted.

Sources: key lists of published all-in-one checkpoints; ComfyUI's model_base.py and sd.py; transformers' buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PASSENGERS = {  # pattern of a whole name -> what it is
    r"(.*\.)?logit_scale": "the temperature of CLIP",
    r"(.*\.)?text_projection(\.weight)?": "a layer of CLIP",
    r"(.*\.)?position_ids": "a table of positions",
    r"(.*\.)?rotary_emb\.inv_freq": "a table of frequencies",
    r"(.*\.)?(spiece_model|tekken_model|tokenizer_json)": "a tokenizer",
    r"(model_ema\.)?(decay|num_updates)": "the state of an average",
    r"(model\.)?(alphas_cumprod|betas|sigmas|log_sigmas)|denoiser\.(sigmas|log_sigmas)": "a table of noise levels",
    r"v_pred|ztsnr|edm_vpred\..*|__index_timestep_zero__": "a mark for ComfyUI",
}
_KNOWN = re.compile("|".join(f"(?:{pattern})" for pattern in PASSENGERS))


def passengers(names: Iterable[str]) -> list[str]:
    """Those of `names` that are tensors without use."""
    return [name for name in names if _KNOWN.fullmatch(name)]
