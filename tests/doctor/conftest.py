"""The doctor compares MLX with NumPy: without MLX there is nothing to test."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("mlx") else ["test_checks.py", "test_faults.py", "test_plan.py", "test_run.py"]
