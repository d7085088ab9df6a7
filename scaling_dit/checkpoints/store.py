"""Checkpoints of a whole training state: asynchronous, atomic, with checksums, readable on any mesh.

The only file that knows Orbax. A checkpoint is a folder named by its step with two items: `state`, the arrays as a
nested dictionary of their paths (so that a part can be read without the rest), and `extra`, a JSON object with the
checksums of all arrays (`checksums.Sealed`). Whatever is read is compared with them.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from scaling_dit import storage, trees
from scaling_dit.checkpoints.checksums import Sealed, checksums
from scaling_dit.checkpoints.folders import set_aside, spelled_for_orbax
from scaling_dit.errors import StorageError, UserError, nearest
from scaling_dit.parallel import processes

# Differing paths that an error names.
_SHOWN = 3
# Bytes of arrays that `verify` reads at once, beside those of the run itself.
_AT_ONCE = 2**27
# Bytes below which one replica writes its part of an array alone. To share it, each device compiles a program that
# cuts it, for each shape: more than it saves for scales, biases, and what a small run has.
_SLICED = 2**20


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
        return True
    # What its threads log with a traceback is raised as well, once somebody waits for them.
    return record.levelno >= logging.WARNING and not record.exc_info


def _not_a_second_fault(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _not_too_late(unraisable: Any, shown: Any = sys.unraisablehook) -> None:
    if unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed":
        return
    shown(unraisable)


# Orbax logs every stage of every save at INFO, on the absl logger that the program itself logs to.
absl_logging.get_absl_logger().addFilter(_not_orbax_chatter)
# Of several arrays that a disk refuses, Orbax waits for the first one and raises its error. asyncio and TensorStore
# then print a traceback for each of the others, which nobody waits for any more.
logging.getLogger("asyncio").addFilter(_not_a_second_fault)
sys.unraisablehook = _not_too_late
# Nor are parts begun that were to be written after them.
warnings.filterwarnings("ignore", r"coroutine '[\w.<>]*serialize[\w.<>]*' was never awaited", RuntimeWarning)


class Damaged(UserError):
    """A checkpoint that is incomplete, or whose arrays are not those that were saved."""


class Checkpoints:
    """The checkpoints of one run, in one folder, local or remote (`gs://`).

    All processes call every method, in the same order.

    Args:
      directory: the folder that holds the checkpoints; made if it does not exist.
      keep_last: how many of the newest are kept.
      keep_every: also keep those whose step is a multiple of this; 0 keeps no others.
      every: steps between regular saves. The newest `keep_last` at its multiples stay as well, so that saves at other
        steps, such as on SIGTERM, push none of them out.
      read_only: open a folder that another process may be writing: nothing is made or cleaned up.
      verify_first: the first save is read back, and no older checkpoint is removed before that.
      patience: seconds to try again while the disk or bucket refuses a save.

    Raises:
      UserError: if `keep_last` is under 1 or `keep_every` is negative.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        every: int = 1,
        read_only: bool = False,
        verify_first: bool = False,
        patience: float = 0.0,
    ) -> None:
        if keep_last < 1 or keep_every < 0:
            raise UserError(
                f"checkpoint.keep_last={keep_last}, checkpoint.keep_every={keep_every}: keep_last must be at"
                " least 1 (a run resumes from it) and keep_every at least 0 (steps; 0 keeps no others)"
            )
        self.directory = epath.Path(directory)
        if "://" not in os.fspath(directory):
            # Orbax wants absolute paths; on gs:// this would prepend the working directory.
            self.directory = self.directory.absolute()
        # Of several processes, one alone cannot try again: they write one checkpoint together, and wait for each other.
        self._read_only, self._patience = read_only, patience if jax.process_count() == 1 else 0.0
        policies: list[preservation_policy.PreservationPolicy] = [
            preservation_policy.LatestN(keep_last),
            preservation_policy.EveryNSteps(every, max_to_keep=keep_last),
        ]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        self._policy = _OnceVerified(preservation_policy.AnyPreservationPolicy(policies), not verify_first)
        self._orbax_folder, self._close_folder = spelled_for_orbax(self.directory, make=not read_only)
        self._remove_unfinished()
        self._manager, self._closed = self._open(), False

    def _remove_unfinished(self) -> None:
        """Removes saves that a kill or a full disk cut short.

        Orbax's own option cleans in a thread that nothing waits for.
        """
        if not self._read_only and self.directory.exists() and jax.process_index() == 0:
            for unfinished in ocp.path.step.all_temporary_paths(self._orbax_folder):
                unfinished.get().rmtree(missing_ok=True)

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._orbax_folder,
            # Named handlers let a fresh process read the metadata of a checkpoint that it did not write.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_array_handlers()),
                "extra": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                create=not self._read_only,
                save_root_metadata=False,
                preservation_policy=self._policy,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # What ended the block is what the user must know; a save that fails as well changes nothing about it.
        with contextlib.suppress(Exception):
            self.close()

    def all_steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending; one still being saved counts."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, None if there is none."""
        return max(self.all_steps(), default=None)

    def wait(self) -> None:
        """Block until every save is complete on disk.

        Raises:
          StorageError: the last one could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._start_anew()
            if not storage.is_refusal(error):
                raise
            raise StorageError(
                f"cannot write a checkpoint in {self.directory}: {storage.reason(error)}"
            ) from error

    def close(self) -> None:
        """Wait for saves in progress, then stop the threads."""
        try:
            self.wait()
        finally:
            if not self._closed:
                self._manager.close()
            self._close_folder()

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None, *, wait: bool = False
    ) -> bool:
        """Save in the background; returns once the arrays are copied, so they may be donated at once.

        While the disk or bucket refuses, for `patience` seconds, the save is tried again. So is one that a save of an
        earlier step, in the background, ended with an error: this step takes its place.

        Args:
          step: the number of updates the state has seen.
          state: a pytree of jax arrays.
          extra: a JSON object stored next to it.
          wait: return only when the checkpoint is complete on disk.

        Returns:
          False if this step is already saved, and then nothing is written.

        Raises:
          UserError: if opened with `read_only`.
          StorageError: it cannot be written, or the first save cannot be read back. Older checkpoints are intact.
        """
        if self._read_only:
            raise UserError(
                f"checkpoints in {self.directory} are open to be read only; step {step} not saved"
            )
        if step in self._manager.all_steps():
            if wait:
                self.wait()
            return False
        arrays = trees.by_path(state)
        sums = checksums(arrays)
        named = {"/".join(path): (_kind(leaf), sums[path]) for path, leaf in arrays.items()}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_nested(arrays)),
            extra=ocp.args.JsonSave(Sealed(dict(extra or {}), named).to_json()),
        )
        verify = not self._policy.verified

        def write() -> None:
            try:
                self._open_again()
                self._manager.save(step, args=items, force=True)
                if wait or verify or retried:
                    self._manager.wait_until_finished()
            except Exception:
                retried.append(True)
                self._start_anew()
                raise

        retried: list[bool] = []
        storage.patiently(write, f"checkpoint {self._folder(step)}", self._patience)
        if verify:
            self.verify(step, state)
        return True

    def _start_anew(self) -> None:
        """Forgets a save that failed: its files, and what the manager of Orbax remembers of it.

        If the disk refuses this too, the next save does it.
        """
        # Closing raises what has been raised already.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._closed = True
        with contextlib.suppress(Exception):
            self._open_again()

    def _open_again(self) -> None:
        if self._closed:
            self._remove_unfinished()
            self._manager, self._closed = self._open(), False

    def verify(self, step: int, target: Any) -> None:
        """Reads a checkpoint back, some arrays at a time, and lets older ones be removed from now on.

        Raises:
          StorageError: it is not what was saved.
        """
        wanted = trees.by_path(target)
        try:
            self.wait()
            with self._together(step):
                sealed = self._check_same(step, wanted, self._metadata(step))
                for part in _parts(wanted):
                    self._read(step, part, sealed)
        except Damaged as error:
            raise StorageError(f"{error}, as soon as it was written; older checkpoints are kept") from error
        self._policy.verified = True

    def restore(self, step: int | None, target: Any) -> tuple[Any, dict[str, Any]]:
        """Read a whole state into the shardings of a target, whatever mesh it was written on.

        Args:
          step: which checkpoint; None for the newest.
          target: a pytree of `jax.ShapeDtypeStruct` (or arrays); leaves without a sharding go to one device.

        Returns:
          The state, of the structure of `target`, and `extra` as it was saved.

        Raises:
          UserError: if there is no such checkpoint, or its paths, shapes or dtypes differ.
          Damaged: it cannot be read, or an array has another checksum than when it was saved.
          StorageError: the disk or bucket refuses to be read.
        """
        step = self._existing(step)
        wanted = trees.by_path(target)
        with self._together(step):
            sealed = self._check_same(step, wanted, self._metadata(step))
            arrays = self._read(step, wanted, sealed)
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[path] for path in wanted]), sealed.extra

    def restore_newest(
        self, target: Any, aside: epath.Path, *, strict: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """`restore` of the newest checkpoint that is not damaged; newer ones are set aside, each named on stderr.

        Args:
          target: as in `restore`.
          aside: the folder that damaged checkpoints are moved to.
          strict: refuse a damaged one.

        Raises:
          UserError, StorageError: as `restore`.
          Damaged: `strict`, or all of them are damaged, and then they stay where they are.
        """
        faults: dict[int, Damaged] = {}
        for step in reversed(self.all_steps()):
            try:
                found = self.restore(step, target)
                break
            except Damaged as fault:
                if strict:
                    raise
                faults[step] = fault
        else:
            if not faults:
                self._existing(None)
            raise Damaged(
                f"none of the {len(faults)} checkpoints in {self.directory} can be used: {faults[max(faults)]}; put a "
                "copy of one back, or give another --workdir"
            )
        for damaged, why in faults.items():
            self.set_aside(damaged, aside, why)
        return found

    def set_aside(self, step: int, aside: epath.Path, fault: Exception) -> None:
        """Moves a damaged checkpoint out of the way and says so, so that its step can be saved again."""
        self.wait()
        if jax.process_index() == 0:
            where = set_aside(self._folder(step), aside)
            kept = f"it is now {where}" if where else "it was removed, for this store cannot move it"
            print(f"scaling-dit: {fault}; {kept}, and the run resumes from an older one", file=sys.stderr)
        processes.barrier()
        self._manager.reload()

    def extra(self, step: int) -> dict[str, Any]:
        """The `extra` of a checkpoint; no array is read.

        Raises:
          UserError: if there is no such checkpoint.
          Damaged, StorageError: it cannot be read.
        """
        return self._sealed(self._existing(step)).extra

    def remove(self, step: int) -> None:
        """Delete a checkpoint for good; waits for saves in progress."""
        self.wait()
        self._manager.delete(step)

    def is_gone(self, step: int) -> bool:
        """Whether a checkpoint that was listed has been removed since, by listing the folder anew."""
        self._manager.reload()
        return step not in self.all_steps()

    def restore_params(
        self, step: int | None, target: Any, *, ema: str | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Read only the parameters, or one of their averages; no other array is read from disk.

        Args:
          step: which checkpoint; None for the newest.
          target: parameters as `jax.ShapeDtypeStruct` (or arrays), as in `restore`.
          ema: the key of the average in `state.emas`; None for the parameters themselves.

        Returns:
          The parameters, of the structure of `target`, and `extra` as it was saved.

        Raises:
          UserError, Damaged, StorageError: as `restore`, and a UserError if there is no such average.
        """
        step = self._existing(step)
        there = self._metadata(step)
        prefix = self._prefix(step, there, ema)
        wanted = {(*prefix, *path): leaf for path, leaf in trees.by_path(target).items()}
        sealed = self._check_same(step, wanted, there, prefix)
        arrays = self._read(step, wanted, sealed)
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[path] for path in wanted]), sealed.extra

    def describe_params(self, step: int | None, *, ema: str | None = None) -> dict[str, Any]:
        """The parameters of a checkpoint, or one of their averages, as shapes and dtypes; no array is read.

        Args:
          step: which checkpoint; None for the newest.
          ema: as in `restore_params`.

        Returns:
          Nested dictionaries of `jax.ShapeDtypeStruct`, without shardings.

        Raises:
          UserError: if there is no such checkpoint or average.
          Damaged, StorageError: it cannot be read.
        """
        step = self._existing(step)
        there = self._metadata(step)
        prefix = self._prefix(step, there, ema)
        return _nested(
            {
                path[len(prefix) :]: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
                for path, leaf in trees.by_path(there).items()
                if path[: len(prefix)] == prefix
            }
        )

    def _prefix(self, step: int, there: Any, ema: str | None) -> tuple[str, ...]:
        """Where parameters, or one of their averages, lie in the state of a checkpoint with the metadata `there`."""
        if ema is None:
            return ("params",)
        names = _averages(there)
        if ema not in names:
            known = nearest(ema, names) if names else "it has none"
            raise UserError(f"no EMA {ema!r} in checkpoint {self._folder(step)}; {known}")
        return ("emas", ema)

    def ema_names(self, step: int | None = None) -> list[str]:
        """The keys of `state.emas` in a checkpoint; None for the newest.

        Raises:
          UserError: if there is no such checkpoint or it is damaged.
        """
        return _averages(self._metadata(self._existing(step)))

    def _folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _existing(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise UserError(
                f"no complete checkpoint in {self.directory}; train first, or give the right workdir"
            )
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are: {steps}")
        return steps[-1] if step is None else step

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns what Orbax raises while it reads into one line."""
        try:
            yield
        except (UserError, jax.errors.JaxRuntimeError, MemoryError):
            # Among them that the devices have no memory left: the checkpoint is not to blame.
            raise
        except Exception as error:
            if storage.is_unreachable(error):
                raise StorageError(
                    f"cannot read checkpoint {self._folder(step)}: {storage.reason(error)}"
                ) from error
            raise self._damaged(step, error) from error

    @contextlib.contextmanager
    def _together(self, step: int) -> Iterator[None]:
        """All processes find a checkpoint damaged if one of them does, which read another part of it."""
        fault = ""
        try:
            yield
        except Damaged as error:
            if jax.process_count() == 1:
                raise
            fault = str(error)
        if jax.process_count() > 1:
            found = [text.decode() for text in processes.gather_bytes(fault.encode()) if text]
            if found:
                raise Damaged(found[0])

    def _damaged(self, step: int, error: Exception) -> Damaged:
        # Orbax and TensorStore messages run over many lines; the first one says what was missing.
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return Damaged(f"checkpoint {self._folder(step)} is damaged or incomplete ({first})")

    def _metadata(self, step: int) -> Any:
        self.wait()
        with self._reading(step):
            metadata = self._manager.item_metadata(step)["state"]
            if metadata is None:
                raise FileNotFoundError("its state cannot be read")
            return metadata.tree

    def _sealed(self, step: int) -> Sealed:
        with self._reading(step):
            items = ocp.args.Composite(extra=ocp.args.JsonRestore())
            return Sealed.from_json(self._manager.restore(step, args=items)["extra"])

    def _check_same(
        self, step: int, wanted: Mapping[Any, Any], there: Any, prefix: tuple[str, ...] = ()
    ) -> Sealed:
        """Makes sure that a checkpoint holds just the arrays of `wanted` below `prefix`; `there` are its metadata."""
        sealed = self._sealed(step)
        kinds = {path: _kind(leaf) for path, leaf in trees.by_path(there).items()}
        if sealed.arrays is not None:
            listed = {name: kind for name, (kind, _) in sealed.arrays.items()}
            if listed != {"/".join(path): kind for path, kind in kinds.items()}:
                raise self._damaged(step, ValueError("its state is not the one that was saved"))
        saved = {path: kind for path, kind in kinds.items() if path[: len(prefix)] == prefix}
        differences = []
        for path in sorted({*wanted, *saved}):
            name = "/".join(path)
            if path not in saved:
                differences.append(f"{name} is not in the checkpoint")
            elif path not in wanted:
                differences.append(f"{name} is only in the checkpoint")
            elif saved[path] != _kind(wanted[path]):
                differences.append(f"{name} is {saved[path]} there, {_kind(wanted[path])} here")
        if differences:
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise UserError(
                f"checkpoint {self._folder(step)} does not fit this run: {'; '.join(differences[:_SHOWN])}{more};"
                " use the config it was written with or another workdir"
            )
        return sealed

    def _read(self, step: int, wanted: Mapping[Any, Any], sealed: Sealed) -> dict[Any, Any]:
        """The arrays at the paths of `wanted`, in its shardings, compared with their checksums."""
        item = _nested({path: _with_sharding(leaf) for path, leaf in wanted.items()})
        restore = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        with self._reading(step):
            read = self._manager.restore(step, args=ocp.args.Composite(state=restore))
        found = trees.by_path(read["state"])
        arrays = {path: found[path] for path in wanted}
        if sealed.arrays is not None:
            sums = checksums(arrays)
            wrong = [name for path in wanted if sealed.arrays[name := "/".join(path)][1] != sums[path]]
            if wrong:
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                raise self._damaged(step, ValueError(f"{wrong[0]}{more} has another checksum than was saved"))
        return arrays


def _array_handlers() -> ocp.type_handlers.TypeHandlerRegistry:
    """How the arrays of a state are written and read."""
    return ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICED)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )


class _OnceVerified(preservation_policy.PreservationPolicy):
    """Keeps every checkpoint until one of this start has been read back, then what another policy keeps."""

    def __init__(self, policy: preservation_policy.PreservationPolicy, verified: bool) -> None:
        self._policy, self.verified = policy, verified

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        if not self.verified:
            return [True] * len(checkpoints)
        return self._policy.should_preserve(checkpoints, context=context)


def _averages(there: Any) -> list[str]:
    """The keys of `emas` in the metadata of a state."""
    return sorted({path[1] for path in trees.by_path(there) if path[0] == "emas"})


def _parts(wanted: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
    """The leaves in groups of at most `_AT_ONCE` bytes, or one leaf."""
    part: dict[Any, Any] = {}
    size = 0
    for path, leaf in wanted.items():
        if part and size + leaf.nbytes > _AT_ONCE:
            yield part
            part, size = {}, 0
        part[path] = leaf
        size += leaf.nbytes
    if part:
        yield part


def _nested(by_path: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dictionaries from paths: no container types and no empty nodes to differ between versions."""
    nested: dict[str, Any] = {}
    for path, leaf in by_path.items():
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return nested


def _kind(leaf: Any) -> str:
    return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
