"""The Ray cluster of a run: joins the one that is there, else starts one on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from openrlhf import device
from openrlhf.config.secrets import is_secret
from openrlhf.errors import InfraError
from openrlhf.ray.guard import watch_over
from openrlhf.strategy import signals

LOG = logging.getLogger(__name__)
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONPATH")
PASSED_ON_PREFIXES = ("RAY_EXPERIMENTAL_NOSET_", "VLLM_", "NCCL_", "GLOO_")
TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
NEEDED_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *TOKEN)
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}
OWN_TOKEN = secrets.token_hex(32)
OF_OUR_OWN = {
    # A process that hangs does not hear Ray ask it to end; a new one gets its place when it was killed.
    "RAY_kill_worker_timeout_milliseconds": "500",
    # The history of every task makes the head of the cluster grow with the run, and nobody here reads it.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
}


def connect(slots: int) -> str:
    """Join a Ray cluster or start one with ``slots`` device slots, and return what a slot is: ``"GPU"`` or ``"CPU"``.

    Ray's own variable ``RAY_ADDRESS`` (which ``ray job submit`` sets) names the cluster; without it the cluster that
    ``ray start`` left running on this machine is joined. A cluster started here listens on the loopback, has no
    dashboard and, by Ray's default, asks every caller for a token. On a machine without GPUs it declares as many as
    the run wants: they are seats, not hardware.

    Ray replaces the handler of SIGTERM: install yours after this call. Asked to stop meanwhile, it raises
    ``KeyboardInterrupt``.

    Raises:
        InfraError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    try:
        if not ray.is_initialized() and not _join():
            _start(slots)
    except SystemExit as error:
        # While Ray starts, its own handler answers SIGTERM.
        signals.ask("SIGTERM")
        raise KeyboardInterrupt from error
    return _slot(ray.cluster_resources(), slots)


def _slot(resources: Mapping[str, float], slots: int) -> str:
    """Return what a device slot is in a cluster of ``resources``; say so where it is not a GPU."""
    if resources.get("GPU", 0) > 0:
        return "GPU"
    hint = "; this machine has one: RAY_ADDRESS=local starts a cluster that uses it" if device.gpu_present() else ""
    LOG.warning("the Ray cluster has no GPU: the %d device slots of this run are CPU cores%s", slots, hint)
    return "CPU"


def disconnect() -> None:
    """Leave the cluster; one that :func:`connect` started ends with it, also where a process of it is stopped."""
    import ray

    ours = signals.is_installed()
    watch_over(_processes_of_ray())
    leaving = threading.Thread(target=ray.shutdown, name="leave Ray")
    leaving.start()
    while leaving.is_alive():
        # Ray gives SIGTERM back to the system on its way out, which would end this process without a word.
        if ours:
            signals.install()
        leaving.join(0.01)
    if os.environ.get(TOKEN[0]) == OWN_TOKEN:
        del os.environ[TOKEN[0]]


def _processes_of_ray() -> list[int]:
    """Return all processes of the cluster that :func:`connect` started; none of another's cluster."""
    import ray

    node = ray._private.worker._global_node
    started = [info.process.pid for infos in node.all_processes.values() for info in infos] if is_ours() else []
    return [*started, *(child for process in started for child in signals.descendants(process))]


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
        if (name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)) and not is_secret(name)
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
    """Start a cluster of this machine alone: it listens on the loopback, and its processes inherit its key only."""
    for name, value in OF_OUR_OWN.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in TOKEN):
        # Without one Ray leaves a token in the home folder, and every cluster started there later asks for it.
        os.environ[TOKEN[0]] = OWN_TOKEN
    import ray

    device.stay_on_loopback()
    with _on_loopback(), _without_secrets(), _deaf_to_sigterm():
        try:
            ray.init(
                address="local",
                num_cpus=max(device.cores(), slots),
                num_gpus=slots if device.device_type() == "cpu" else None,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=output_is_logged(),
            )
        except Exception as error:  # Ray has no class of its own for this
            raise InfraError(f"Ray did not start on this machine: {error}") from error
    watch_over(signals.descendants(os.getpid()))


def is_ours() -> bool:
    """Return whether :func:`connect` started the cluster: then it has what this machine has and never grows."""
    import ray

    node = ray._private.worker._global_node
    return node is not None and node.is_head()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a Ray that is started inside the block use the loopback, which it does by itself on other systems only."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Take the keys that no worker needs out of the environment that processes started inside the block inherit."""
    hidden = {name: os.environ.pop(name) for name in [*os.environ] if is_secret(name) and name not in NEEDED_SECRETS}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Let the processes of a Ray that is started inside the block miss SIGTERM: they keep the mask of this thread.

    A signal to the whole process group, as from ``timeout`` or SLURM, would end them before the run could be saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
