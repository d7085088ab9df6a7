"""Every test sees eight simulated CPU devices, so that sharding is tested on any machine."""

import atexit
import fcntl
import gc
import os
import shutil
import signal
import sys
import tempfile
import types

import pytest

from tests.support import xla

# Started with nohup or in the background of a script these are ignored, in the commands that tests start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Until all tests are collected: what is imported stays, and the collector would walk through it again and again.
gc.disable()
# Read once, when jax makes its backend, so they stand before any test module imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
xla.prepare(os.environ)
# Most of the time goes into compiling the same few programs: one session, its workers and the commands it starts share
# what was compiled. Nothing outlives the session, so no test runs on an older program.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="scaling_dit_tests_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    # Without those that compile at once: to find, store and load them costs more than to compile them again.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


# On a machine that does other work too; the other tests have what pyproject.toml says.
SLOW_TEST_SECONDS = 900


# The files that take the longest, the longest first: begun last, one of them would keep one worker busy alone. Only
# one of them starts with `smoke_run`, so that no worker waits for the other to make it.
LONGEST = (
    "training/test_train.py",
    "planning/test_plan.py",
    "evaluation/test_run.py",
    "training/test_rewind.py",
    "model/test_frozen.py",
    "sampling/test_sample.py",
    "interop/test_import_export.py",
    "interop/test_diffusers_folders.py",
    "nn/test_short_attention.py",
    # Of the slow suite; those that read `smoke_study` are begun one after the other.
    "tests/test_docs.py",
    "parallel/test_several_processes.py",
    "parallel/test_every_backbone.py",
    "planning/test_paper_plans.py",
    "tpu/test_launch.py",
    "backbones/test_unet.py",
    "costs/test_paper_tables.py",
    "scaling/test_study_on_slices.py",
    "scaling/test_members_at_once.py",
    "tests/test_ladders.py",
    "training/test_stages.py",
    "tests/test_studies.py",
    "scaling/test_study.py",
    "backbones/test_conditions.py",
    "interop/test_pipelines.py",
    "training/test_mup.py",
    "parallel/test_layouts.py",
    "training/test_conditions.py",
    "curation/test_prepare_runs.py",
    "tests/test_drill.py",
    "vqa/test_transformers_models.py",
    "training/test_report.py",
    "planning/test_tpu_programs.py",
    "evaluation/test_several_processes.py",
    "metrics/test_folders_of_images.py",
    "tpu/test_histories.py",
    "checkpoints/test_posthoc_ema.py",
    "doctor/test_doctor.py",
    "tests/test_editing.py",
    "parallel/test_compile_cache.py",
    "backbones/test_lumina.py",
    "training/test_old_run.py",
    "encoders/test_text_in_runs.py",
    "nn/test_splash.py",
    "backbones/test_unet_if.py",
    "data/test_tfds.py",
    "parallel/test_rules.py",
    "tests/test_aot_step.py",
    "diffusion/test_published_samplers.py",
    "tpu/test_kills.py",
    "training/test_adapters.py",
    "backbones/test_pixart.py",
    "training/test_kill.py",
    "backbones/test_uvit.py",
    "scaling/test_report.py",
    "diffusion/test_extending_sampler.py",
    "tests/test_conditions_page.py",
    "cli/test_mistakes.py",
    "interop/test_lora.py",
    "training/test_buckets.py",
    "training/test_precision.py",
    "scaling/test_coverage.py",
    "tests/test_benchmarks.py",
    "backbones/test_large_dit.py",
    "tests/test_docs_own_parts.py",
    "tests/test_golden.py",
    "prepared/test_source.py",
    "features/test_networks.py",
    "data/test_loader.py",
    "config/test_extending_field.py",
    "data/test_damage.py",
    "data/test_extending_source.py",
    "sampling/test_extending_option.py",
)


# Words of a file that has slow tests: the mark itself, and the helpers that give it to some cases (tests/test_files.py
# looks that no others do).
SLOW_WORDS = ("slow", "swept", "on_meshes")


def pytest_ignore_collect(collection_path, config):
    """Of the slow suite, the files that have none: importing them is a third of what collecting takes."""
    if config.getoption("markexpr") == "slow" and collection_path.suffix == ".py":
        text = collection_path.read_text()
        return True if not any(word in text for word in SLOW_WORDS) else None
    return None


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {name: number for number, name in enumerate(LONGEST)}
        # The order within a file, and of all other files, stays.
        items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TEST_SECONDS))


def pytest_collection_finish():
    """The collector leaves alone what the imports made: walking through it again and again took a third of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()
    if "jax" in sys.modules:
        xla.share_contexts()
        xla.remember_shapes_of_parameters()


@pytest.fixture(scope="module")
def on_one_device():
    """Runs are opened, and imported, on one device: for files of which layouts are not the subject."""
    from tests.support.runs import open_on_one_device

    with pytest.MonkeyPatch.context() as patch:
        open_on_one_device(patch)
        yield


@pytest.fixture(scope="module")
def verbs_on_one_device(on_one_device):
    """Runs of the verbs `train` and `study`, and of `scaling_dit.train`, are trained on one device as well."""
    from tests.support.runs import train_on_one_device

    with pytest.MonkeyPatch.context() as patch:
        train_on_one_device(patch)
        yield


@pytest.fixture(scope="module")
def opened_once():
    """A run is read once for all tests of a file, on one device: for files of which reading is not the subject."""
    from tests.support.runs import open_once

    with pytest.MonkeyPatch.context() as patch:
        open_once(patch)
        yield


@pytest.fixture(scope="module")
def inspected_once():
    """Beam inspects each function of a pipeline once, not at every look at a step: half of what a small one takes."""
    from apache_beam.transforms import core

    real, found = core.get_function_args_defaults, {}

    def remembered(function):
        key = getattr(function, "__func__", function), isinstance(function, types.MethodType)
        if key not in found:
            found[key] = real(function)
        return tuple(list(part) for part in found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "get_function_args_defaults", remembered)
        yield


def _made_once(tmp_path_factory, name, make):
    """The folder that `make` fills. All workers read the same: the first that needs it makes it, others wait."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made, finished = folder / name, folder / f"{name}.finished"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            make(made)
            finished.touch()
    return made


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """The workdir of a finished miniature run of experiments/shapes.py: checkpoints at steps 2 and 4; read only.

    One device and no TensorBoard, which has tests of its own, take a third of the time.
    """
    import jax

    from scaling_dit import config
    from scaling_dit.training import loop

    def make(folder):
        plain = config.load("experiments/shapes.py:smoke", ["--config.log.tensorboard=False"])
        loop.train(plain, folder, devices=jax.devices()[:1])

    return _made_once(tmp_path_factory, "smoke", make)


@pytest.fixture(scope="session")
def smoke_study(tmp_path_factory):
    """The folder of a finished miniature study, experiments/studies/shapes_core.py:smoke, on one device; read only."""
    from scaling_dit.cli import main as cli
    from tests.support.runs import open_on_one_device, train_on_one_device

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            train_on_one_device(patch)
            open_on_one_device(patch)
            # A study drops the programs of a member that is done, and here those of all other tests as well.
            patch.setattr("jax.clear_caches", lambda: None)
            assert cli.main(["study", "--config=shapes_core:smoke", f"--workdir={folder}"]) == 0

    return _made_once(tmp_path_factory, "study", make)
