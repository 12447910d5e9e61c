"""What a user should know of a run before it starts, and what stops no run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import listing
from zimage_ref.lora.clients import losses_of
from zimage_ref.lora.trained import DEFAULT_KIND, TRAINED
from zimage_ref.model.tokenizer import MAX_TOKENS, Tokenizer

from .config import TrainConfig, default_options
from .dataset import Example
from .kinds import FULL
from .optimizers import OPTIMIZERS
from .preview_prompts import Preview
from .variants import Variants

_OF_PRESERVE = ("preserve_every", "preserve_weight")
_SHOWN = 200  # characters of a path or a prompt in a notice


def notices_of(
    config: TrainConfig, model: ModelFolder, examples: Sequence[Example], previews: Sequence[Preview]
) -> list[str]:
    """Notices of long texts, of programs that do not load the result, and of options that do not help."""
    return [
        *_long_texts(config, model, examples, previews), *_readers(config), *_unused(config, previews),
        *_against_itself(config, examples),
    ]  # fmt: skip


def _long_texts(
    config: TrainConfig, model: ModelFolder, examples: Sequence[Example], previews: Sequence[Preview]
) -> Iterator[str]:
    """Notices of captions and of prompts that are longer than the model reads."""
    tokenizer, variants = Tokenizer(model.tokenizer), Variants(config)
    texts = {
        "captions": {str(e.picture): max(variants.all_of(e.caption), key=len) for e in examples},
        "prompts": {text: text for text in (*config.preserve_prompt, *(t for each in previews for t in each.texts))},
    }
    for what, named in texts.items():
        counts = {name[:_SHOWN]: count for name, text in named.items() if (count := tokenizer.count(text)) > MAX_TOKENS}
        if counts:
            found = listing([f"{name} ({count})" for name, count in counts.items()], 5)
            yield f"{what} longer than {MAX_TOKENS} tokens are cut off ({len(counts)}): {found}"


def _unused(config: TrainConfig, previews: Sequence[Preview]) -> Iterator[str]:
    """Notices of options that have no effect beside others."""
    if OPTIMIZERS[config.optimizer].averages and config.schedule != "constant":
        yield (
            f"`optimizer` {config.optimizer} keeps the learning rate after the warmup: "
            f"`schedule` {config.schedule} is not used"
        )
    given = [name for name in _OF_PRESERVE if getattr(config, name) != default_options()[name]]
    if given and not config.preserves:
        yield (
            f"{' and '.join(f'`{name}`' for name in given)}: not used, as nothing is preserved. "
            "Give `preserve`, `preserve_prompt` or `preserve_blank`. The run may change words that the model knows"
        )
    for each in previews:
        if each.negative_prompt and not each.guidance:
            yield f"`preview_prompt` {each.text!r}: its negative prompt is not used without guidance"


def _against_itself(config: TrainConfig, examples: Sequence[Example]) -> Iterator[str]:
    """A notice of prompts to preserve that hold a trigger."""
    triggers = {example.settings.trigger for example in examples} - {""}
    if found := [text[:_SHOWN] for text in config.preserve_prompt if any(trigger in text for trigger in triggers)]:
        yield (
            f"prompts to preserve that hold the trigger ({len(found)}): {listing(found, 3)}: the run would "
            "not learn the trigger there: leave these prompts out"
        )


def _readers(config: TrainConfig) -> list[str]:
    """Which programs load the result, if not all do."""
    if config.kind in (DEFAULT_KIND, FULL):
        return []
    title = TRAINED[config.kind].title
    return [*losses_of([title], config.lora_format), f"{title}: mflux refuses a file that holds it"]
