"""Decides what to do about an earlier run with the same output: resume it, replace it, or refuse to start."""

from __future__ import annotations

from zimage_ref.errors import ConfigError
from zimage_ref.formats.files import check_writable
from zimage_ref.lora.alpha import sidecar

from .cache import entry_names
from .config import TrainConfig
from .facts import RunFacts, changes
from .kinds import FULL
from .run_folder import RunFolder, SavedState
from .whole_file import check_names


def state_to_resume(config: TrainConfig, run: RunFolder, facts: RunFacts) -> tuple[SavedState | None, list[str]]:
    """The state to resume from (None: start at the first step), and notices for the user.

    Raises ConfigError if a file cannot be written, if the output or an unfinished run would be overwritten without
    `overwrite`, and if the run to resume had other `facts`.
    """
    _check_names(config, run, facts["total"])
    if config.resume:
        return _to_resume(config, run, facts)
    if (step := run.unfinished()) and not config.overwrite:
        raise ConfigError(
            f"{run.path}: holds a run that stopped at step {step}: `resume` continues it, `overwrite` replaces it"
        )
    if config.output.exists() and not config.overwrite:
        raise ConfigError(f"{config.output}: exists: give `overwrite` to replace it, or another `output`")
    return None, []


def _check_names(config: TrainConfig, run: RunFolder, total: int) -> None:
    """Raises ConfigError if the run cannot write one of its files at the end, or while it goes on."""
    saves = range(config.save_every, total, config.save_every) if config.save_every else ()
    results = [config.output, *map(run.result, saves)]
    if config.kind == FULL:
        for path in results:
            check_names(path)
    else:
        check_writable(*results, *map(sidecar, results))
    check_writable(*run.names(total), *entry_names(config.cache_folder))


def _to_resume(config: TrainConfig, run: RunFolder, facts: RunFacts) -> tuple[SavedState | None, list[str]]:
    saved, notices = run.latest()
    if not saved:
        return None, [*notices, f"{run.path}: has nothing to resume yet: starting at the first step"]
    if different := changes(saved.facts, facts):
        text = f"{run.path}: the run that stopped at step {saved.step} differs from this one: {'; '.join(different)}"
        if not config.resume_anyway:
            raise ConfigError(f"{text}: `resume_anyway` continues it anyway")
        notices.append(text)
    if saved.facts["environment"] != facts["environment"]:
        notices.append("the run began with other software or on another machine: results may differ in the last digits")
    return saved, notices
