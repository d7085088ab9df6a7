"""Checkpoints of a whole training state: asynchronous, atomic, readable on any mesh.

The only file that knows Orbax. A checkpoint is a folder named by its step with two items: `state`, the arrays as a
nested dictionary of their paths (so that a part can be read without the rest), and `extra`, a JSON object.
"""

import logging
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from scaling_dit import trees
from scaling_dit.errors import UserError, nearest

# Differing paths that an error names.
_SHOWN = 3


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


# Orbax logs every stage of every save at INFO, on the absl logger that the program itself logs to.
absl_logging.get_absl_logger().addFilter(_not_orbax_chatter)


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
        self._read_only = read_only
        if not read_only and self.directory.exists() and jax.process_index() == 0:
            # Saves that a kill cut short. Orbax's own option cleans in a thread that nothing waits for.
            for unfinished in ocp.path.step.all_temporary_paths(self.directory):
                unfinished.get().rmtree(missing_ok=True)
        policies: list[preservation_policy.PreservationPolicy] = [
            preservation_policy.LatestN(keep_last),
            preservation_policy.EveryNSteps(every, max_to_keep=keep_last),
        ]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Named handlers let a fresh process read the metadata of a checkpoint that it did not write.
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                save_root_metadata=False,
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending; one still being saved counts."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, None if there is none."""
        return max(self.all_steps(), default=None)

    def wait(self) -> None:
        """Block until every save is complete on disk; an error met while writing is raised here."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves in progress, then stop the threads."""
        self.wait()
        self._manager.close()

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None, *, wait: bool = False
    ) -> bool:
        """Save in the background; returns once the arrays are copied, so they may be donated at once.

        Args:
          step: the number of updates the state has seen.
          state: a pytree of jax arrays.
          extra: a JSON object stored next to it.
          wait: return only when the checkpoint is complete on disk.

        Returns:
          False if this step is already saved, and then nothing is written.

        Raises:
          UserError: if opened with `read_only`.
        """
        if self._read_only:
            raise UserError(
                f"checkpoints in {self.directory} are open to be read only; step {step} not saved"
            )
        new = step not in self._manager.all_steps()
        if new:
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave(_nested(trees.by_path(state))),
                extra=ocp.args.JsonSave(dict(extra or {})),
            )
            self._manager.save(step, args=items, force=True)
        if wait:
            self.wait()
        return new

    def restore(self, step: int | None, target: Any) -> tuple[Any, dict[str, Any]]:
        """Read a whole state into the shardings of a target, whatever mesh it was written on.

        Args:
          step: which checkpoint; None for the newest.
          target: a pytree of `jax.ShapeDtypeStruct` (or arrays); leaves without a sharding go to one device.

        Returns:
          The state, of the structure of `target`, and `extra` as it was saved.

        Raises:
          UserError: if there is no such checkpoint, it is damaged, or its paths, shapes or dtypes differ.
        """
        step = self._existing(step)
        wanted, saved = trees.by_path(target), trees.by_path(self._metadata(step))
        self._check_same(step, wanted, saved)
        return self._read(step, wanted, target)

    def extra(self, step: int) -> dict[str, Any]:
        """The `extra` of a checkpoint; no array is read.

        Raises:
          UserError: if there is no such checkpoint or it is damaged.
        """
        step = self._existing(step)
        try:
            return dict(
                self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
            )
        except Exception as error:
            raise self._damaged(step, error) from error

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
          UserError: as `restore`, and if there is no such average.
        """
        step = self._existing(step)
        names = self.ema_names(step)
        if ema is not None and ema not in names:
            known = nearest(ema, names) if names else "it has none"
            raise UserError(f"no EMA {ema!r} in checkpoint {self._folder(step)}; {known}")
        prefix = ("params",) if ema is None else ("emas", ema)
        wanted = {(*prefix, *path): leaf for path, leaf in trees.by_path(target).items()}
        saved = trees.by_path(self._metadata(step))
        self._check_same(step, wanted, {p: leaf for p, leaf in saved.items() if p[: len(prefix)] == prefix})
        return self._read(step, wanted, target)

    def ema_names(self, step: int | None = None) -> list[str]:
        """The keys of `state.emas` in a checkpoint; None for the newest.

        Raises:
          UserError: if there is no such checkpoint or it is damaged.
        """
        return sorted(
            {path[1] for path in trees.by_path(self._metadata(self._existing(step))) if path[0] == "emas"}
        )

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

    def _damaged(self, step: int, error: Exception) -> UserError:
        # Orbax and TensorStore messages run over many lines; the first one says what was missing.
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return UserError(
            f"checkpoint {self._folder(step)} is damaged or incomplete ({first});"
            " delete that folder to resume from the one before it"
        )

    def _metadata(self, step: int) -> Any:
        self.wait()
        try:
            metadata = self._manager.item_metadata(step)["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        if metadata is None:
            raise self._damaged(step, FileNotFoundError("its state cannot be read"))
        return metadata.tree

    def _check_same(self, step: int, wanted: Mapping[Any, Any], saved: Mapping[Any, Any]) -> None:
        differences = []
        for path in sorted({*wanted, *saved}):
            name = "/".join(path)
            if path not in saved:
                differences.append(f"{name} is not in the checkpoint")
            elif path not in wanted:
                differences.append(f"{name} is only in the checkpoint")
            elif _kind(saved[path]) != _kind(wanted[path]):
                differences.append(f"{name} is {_kind(saved[path])} there, {_kind(wanted[path])} here")
        if differences:
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise UserError(
                f"checkpoint {self._folder(step)} does not fit this run: {'; '.join(differences[:_SHOWN])}{more};"
                " use the config it was written with or another workdir"
            )

    def _read(self, step: int, wanted: Mapping[Any, Any], target: Any) -> tuple[Any, dict[str, Any]]:
        """Arrays at the paths of `wanted`, in the structure of `target` (same leaves, same order)."""
        item = _nested({path: _with_sharding(leaf) for path, leaf in wanted.items()})
        restore = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        try:
            read = self._manager.restore(
                step, args=ocp.args.Composite(state=restore, extra=ocp.args.JsonRestore())
            )
        except Exception as error:
            raise self._damaged(step, error) from error
        arrays = trees.by_path(read["state"])
        leaves = [arrays[path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(target), leaves), dict(read["extra"])


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
