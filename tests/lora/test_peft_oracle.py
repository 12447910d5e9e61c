"""peft saves adapters, and they mean here what they mean to peft itself. The same for modules of lycoris."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_loras import BASE, SHAPES

from zimage_ref.formats.tensors import Tensor
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.merge import merge_loras

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs the extra `oracle`")
peft = pytest.importorskip("peft", reason="needs the extra `oracle`")

LAYERS = ("layers.0.attention.to_q", "layers.1.feed_forward.w1", "context_refiner.0.attention.to_k")
BIASED, SAVED = "layers.0.adaLN_modulation.0", "all_final_layer.2-1.linear"
PATTERNS = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {r"layers.1.feed_forward.w1": 5, "to_k": 1}}
CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*LAYERS], **PATTERNS),
    "rsLoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*LAYERS], use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*LAYERS], use_dora=True),
    "bias": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=[BIASED], lora_bias=True),
    "saved": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*LAYERS], modules_to_save=[SAVED]),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=[*LAYERS], **PATTERNS),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=6, target_modules=[*LAYERS], **PATTERNS),
    "whole LoKr": lambda: peft.LoKrConfig(r=64, alpha=16, target_modules=[*LAYERS]),
    "LoKr of four": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=[*LAYERS], decompose_both=True),
}


class Layers(torch.nn.Module):
    """Linear layers under the official names, with the tiny transformer's weights."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (*LAYERS, BIASED, SAVED):
            *path, last = layer.split(".")
            home: Any = self
            for name in path:
                if name not in home._modules:
                    home.add_module(name, torch.nn.Module())
                home = home._modules[name]
            outputs, inputs = SHAPES[f"{layer}.weight"]
            linear = torch.nn.Linear(inputs, outputs, bias=f"{layer}.bias" in SHAPES)
            linear.load_state_dict({k: torch.tensor(BASE[f"{layer}.{k}"]) for k in linear.state_dict()})
            home.add_module(last, linear)


@pytest.mark.filterwarnings("ignore:Adapter .default.:UserWarning")  # peft takes its own biases for damage
@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saved_changes_the_weights_as_peft_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Layers(), CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    wanted = {key: value.numpy() for key, value in model.merge_and_unload().state_dict().items()}
    file = read_lora(tmp_path, SHAPES)
    merged = merge_loras({key: Tensor.of(value) for key, value in BASE.items()}, [(file.updates, 1.0)])
    changed = 0
    for key, value in wanted.items():
        np.testing.assert_allclose(merged[key].read(), value, atol=2e-5, err_msg=key)
        changed += bool(np.abs(value - BASE[key]).max() > 1e-3)
    assert changed == len(file.updates)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "lokr whole", "dora"])
def test_a_module_of_lycoris_does_what_it_does_there(algorithm: str, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris", reason="needs the package lycoris-lora")
    from safetensors.torch import save_file

    kinds = {"loha": lycoris.LohaModule, "lokr": lycoris.LokrModule}
    torch.manual_seed(1)
    layer, network = LAYERS[1], Layers()
    linear = network.get_submodule(layer)
    kind = kinds.get(algorithm.split()[0], lycoris.LoConModule)
    rank = 1000 if "whole" in algorithm else 4
    module = kind(f"lycoris_{layer.replace('.', '_')}", linear, 1.0, rank, 6, weight_decompose=algorithm == "dora")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = {f"{module.lora_name}.{key}": value.contiguous() for key, value in module.state_dict().items()}
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    module.apply_to()
    with torch.no_grad():
        x = torch.randn(5, linear.in_features)
        wanted = linear(x).numpy()
    updates = read_lora(tmp_path / "x.safetensors", SHAPES).updates
    merged = merge_loras({key: Tensor.of(value) for key, value in BASE.items()}, [(updates, 1.0)])
    weight = merged[f"{layer}.weight"].read()
    assert np.abs(weight - BASE[f"{layer}.weight"]).max() > 1e-3
    np.testing.assert_allclose(x.numpy() @ weight.T, wanted, atol=2e-4)
