"""The Ray cluster of a run: joins the one that is there, else starts one on this machine."""

from __future__ import annotations

import logging
import os
import stat

from openrlhf import device
from openrlhf.errors import InfraError

PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONPATH")
PASSED_ON_PREFIXES = ("RAY_EXPERIMENTAL_NOSET_", "VLLM_", "NCCL_", "GLOO_")
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}
WITHOUT_DASHBOARD = {
    # The history of every task makes the head of the cluster grow with the run, and nobody here reads it.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
}


def connect(slots: int) -> str:
    """Join a Ray cluster or start one with ``slots`` device slots, and return what a slot is: ``"GPU"`` or ``"CPU"``.

    Ray's own variable ``RAY_ADDRESS`` (which ``ray job submit`` sets) names the cluster; without it the cluster that
    ``ray start`` left running on this machine is joined. A cluster started here has no dashboard and, by Ray's
    default, asks every caller for a token. On a machine without GPUs it declares as many as the run wants: they are
    seats, not hardware.

    Ray replaces the handler of SIGTERM: install yours after this call.

    Raises:
        InfraError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized() and not _join():
        _start(slots)
    return "GPU" if ray.cluster_resources().get("GPU", 0) > 0 else "CPU"


def disconnect() -> None:
    """Leave the cluster; one that :func:`connect` started ends with it."""
    import ray

    ray.shutdown()


def output_is_logged() -> bool:
    """Return whether standard output and error of this process are one file: then workers may write there too.

    Between ``open_run`` and the end of a run they are the log of the run; a terminal stays free of workers' noise.
    """
    out, err = os.fstat(1), os.fstat(2)
    return stat.S_ISREG(out.st_mode) and os.path.samestat(out, err)


def worker_environment() -> dict[str, str]:
    """Return the variables of this process that workers on other machines need too; never a secret."""
    return {
        name: value
        for name, value in os.environ.items()
        if (name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)) and not any(word in name for word in SECRETS)
    }


def _join() -> bool:
    """Join a running cluster and return whether there was one."""
    import ray
    from ray._private.utils import read_ray_address

    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return False
    address = named or read_ray_address()
    if not address:
        return False
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=output_is_logged())
    except (ConnectionError, ValueError, RuntimeError) as error:
        if not named:
            return False
        raise InfraError(f"RAY_ADDRESS={named} does not answer: {error}") from None
    return True


def _start(slots: int) -> None:
    for name, value in WITHOUT_DASHBOARD.items():
        os.environ.setdefault(name, value)
    import ray

    ray.init(
        address="local",
        num_cpus=max(device.cores(), slots),
        num_gpus=slots if device.device_type() == "cpu" else None,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=output_is_logged(),
    )
