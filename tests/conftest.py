import os

os.environ["MLX_ENABLE_TF32"] = "0"  # read once, when mlx is first used: float32 has to mean float32
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices are tiny here: threads that wait for each other cost more

import gc
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import tiny

import zimage_mlx  # noqa: F401 - before a test imports MLX: it loads a fast BLAS

for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if _number and signal.getsignal(_number) is signal.SIG_IGN:  # of a background job, of nohup; tests send these
        signal.signal(_number, _usual)


def pytest_report_header() -> str:
    """Says which comparisons this run can make."""
    absent = [name for name in ("mlx", "diffusers") if find_spec(name) is None]
    return (
        f"not installed, so skipped: the tests that need {' or '.join(absent)}" if absent else "mlx and diffusers found"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file of live comparisons alone imports torch and diffusers. A run that leaves them out does not read it."""
    left_out = "not oracle" in config.option.markexpr
    return True if left_out and collection_path.stem.endswith("oracle") else None


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    """No test cuts the power, so nothing need wait until a file is on the disk: thousands are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which also needs an open file
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Looks for no garbage while tests are collected: they are many objects, and all of them stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _no_figures_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An empty cache folder: what `zimage doctor` measured on this machine would decide about results."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in the official layout, float32; tests only read it."""
    return tiny.write_model_folder(tmp_path_factory.mktemp("model"))
