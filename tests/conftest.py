"""Fixtures of every test: a CPU, no network, no window."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_processes

# Before anything imports these libraries. Tolerances are those of float32 on a CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Tests share compiled programs, of earlier runs too if a folder for them is named: compilation is most of the
# tests' time. With a limit JAX locks the folder: several workers write into it.
if not os.environ.get("TRBERT_TEST_PROGRAMS"):
    os.environ["TRBERT_TEST_PROGRAMS"] = programs = tempfile.mkdtemp(prefix="trbert-test-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TRBERT_TEST_PROGRAMS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(10**10)
# A test that depends on the program that users run asks for `optimized`:
# parity with the published models, speed, what devices send each other.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A shell starts background jobs, and with them a whole CI run, deaf to Ctrl-C; `nohup` to SIGHUP. The tests
# send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure() -> None:
    """Makes JAX compile faster where the programs need not be those of users: private, so only if found."""
    import jax

    patch = pytest.MonkeyPatch()
    try:
        # Otherwise JAX scans the folder of programs, in case it exceeds the limit, whenever it adds one.
        from jax._src.lru_cache import LRUCache

        patch.setattr(LRUCache, "_evict_if_needed", lambda *_, **__: None, raising=False)
        from jax._src import compiler

        options_for_users = compiler.get_compile_options
    except (ImportError, AttributeError):  # a later jax may have them elsewhere
        return

    def options(*arguments: Any, **settings: Any) -> Any:
        found = options_for_users(*arguments, **settings)
        if jax.config.read("jax_disable_most_optimizations"):
            found.env_option_overrides = [*found.env_option_overrides, *tiny_processes.HURRIED.items()]
        return found

    patch.setattr(compiler, "get_compile_options", options)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch")


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """The compiler does what it does for users, in this process and in those it starts."""
    import jax  # reads the settings above

    name, hurried = "JAX_DISABLE_MOST_OPTIMIZATIONS", jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "0")
        jax.config.update(name.lower(), False)
        yield
    jax.config.update(name.lower(), hurried)
