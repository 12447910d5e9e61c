"""LoRA training: a whole run, from the pictures to the LoRA. It does this, and yields these events:

    check the pictures, plan the run                        Encoded
    look for an earlier run to go on with                   Notice
    encode captions and pictures, or find them encoded      Encoded
    load the base, and put a LoRA beside it                 Encoded, if the base itself trains and must not forget
    begin, or go on with what was saved                     Started
    measure the held-out loss, draw previews                Validated, Previewed
    for each step:
        compute the gradient, apply the optimizer           Step
        measure and draw, if it is due                      Validated, Previewed
        save the LoRA and the state, if it is due           Saved, Checkpointed
        if asked to stop: save the state, and end           Checkpointed, Stopped
    measure, draw, save the state                           Validated, Previewed, Checkpointed
    write the LoRA                                          Done

The code up to `Started` is here, the rest in `loop`. A step follows from the state before it, the options and the
cached data alone, so `resume` gives the same bytes as a run that nothing interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from zimage_mlx.device import give_memory_back_early, gpu_errors_explained
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.formats.quantize import GROUP_SIZE
from zimage_ref.memory import Mode
from zimage_ref.training.checked_dataset import CheckedDataset
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.earlier_run import state_to_resume
from zimage_ref.training.events import Encoded, Event, Notice, Stopped
from zimage_ref.training.kinds import FULL
from zimage_ref.training.logs import opened_logs
from zimage_ref.training.metrics import recorded
from zimage_ref.training.plan import plan_for
from zimage_ref.training.run_folder import RunFolder, SavedState
from zimage_ref.training.whole_room import written

from .encode import EncodedDataset
from .loop import Loop
from .machines import Machines, lost_machine_is_an_error
from .precision import resolve_base_precision
from .saver import environment


def train(config: TrainConfig, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Trains a LoRA or the transformer and writes it, yielding an event for each thing done.

    Everything is checked before any weights are read. The text encoder and the autoencoder are freed before the
    transformer is loaded. `should_stop` is asked after each part of the preparation and after each step. Then the run
    yields Stopped and ends; steps that were made are saved before. Under `mlx.launch` the machines share the work, and
    only the first writes and yields.
    Raises DatasetError, ConfigError, FormatError, WeightError or TrainingError.
    """
    machines = Machines(should_stop)
    with lost_machine_is_an_error(), gpu_errors_explained(training=True):
        if machines.first:
            with RunFolder(config.output).locked():
                yield from _events(config, machines)
        else:
            for _ in _events(config, machines):
                pass


def _events(config: TrainConfig, machines: Machines) -> Iterator[Event]:
    """The run on one machine, whether it is the first one or not."""
    dataset = CheckedDataset(config)
    for checked in dataset.check():
        yield checked
        if machines.alone and machines.asked_to_stop():
            yield Stopped(0)
            return
    plan = plan_for(config, dataset, machines.size)
    yield from map(Notice, plan.notices)
    if plan.turbo_warning:
        yield Notice(plan.turbo_warning)
    run, facts = RunFolder(config.output), plan.facts(environment())
    machines.agree(facts)
    saved, notices = state_to_resume(config, run, facts) if machines.first else (None, [])
    yield from map(Notice, notices)

    dtype, quantization = resolve_base_precision(config)
    bits, group_size = (quantization.bits, quantization.group_size) if quantization else (None, GROUP_SIZE)
    pipeline = ZImagePipeline(plan.model, dtype, quantize=bits, group_size=group_size)
    limit = pipeline.memory_limit()
    choice = plan.choose_memory(dtype, quantization, limit, pipeline.footprint)
    footprint = pipeline.footprint("lean" if choice.mode == "fast" else choice.mode)
    plan.require_memory(plan.memory(dtype, quantization, choice.mode, footprint), limit)
    if choice.mode == "stream":
        yield Notice(f"memory {choice.sentence(plan.model)}")
        if config.kind == FULL:
            yield Notice(written(plan, dtype))
    _set_mode(pipeline, config, choice.mode)
    pipeline.unpack = _unpacks(pipeline, config, saved)
    if machines.first and not config.resume:
        run.clear()
    data = EncodedDataset(plan, pipeline)
    done = saved.step if saved else 0
    with opened_logs(run, config.log if machines.first else (), facts, done) as logs:
        yield from map(Notice, logs.notices)
        if (yield from _until_stop(data.build(machines.rank, machines.size), machines)):
            yield Stopped(done)
            return
        loop = Loop(plan, pipeline, data, machines, facts, saved)
        if (yield from _until_stop(loop.prepare(done), machines)):
            yield Stopped(done)
            return
        loop.begin(facts, saved)
        yield from recorded(loop.events(), run, facts, loop.done, logs) if machines.first else loop.events()


def _until_stop(work: Iterator[Encoded], machines: Machines) -> Generator[Encoded, None, bool]:
    """Does `work`, yielding each part. Whether the run was asked to stop before the end of it."""
    for encoded in work:
        yield encoded
        if machines.asked_to_stop():
            return True
    return False


def _set_mode(pipeline: ZImagePipeline, config: TrainConfig, mode: Mode) -> None:
    """Makes the pipeline as frugal as `mode` says."""
    if mode != "fast":
        give_memory_back_early()
    # with auto, what does not fit into the mode fast keeps as much of it as fits: see `loop`
    between = config.memory == "auto" and mode == "lean"
    pipeline.set_mode("fast" if between else mode)


def _unpacks(pipeline: ZImagePipeline, config: TrainConfig, saved: SavedState | None) -> bool:
    """Whether quantized weights are unpacked. A resumed run goes on as it was saved, for the same results."""
    if config.memory != "fast":
        return pipeline.unpacks("lean")
    before = saved.facts.get("unpacks") if saved else None
    return pipeline.unpacks("fast") if before is None else before
