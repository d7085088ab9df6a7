"""Python runs this first in each of several processes that a test starts, see `xla.one_of_several`.

Of several processes the first alone writes to the cache of compiled programs. On CPUs the others would never find what
it wrote: the key of a program holds which process asks. Here it holds the kinds of the devices instead; their numbers
stand in the options of the compiler, which are part of the key as well.

Nor is TensorFlow there, which TensorBoard takes seconds to load: what several processes do is not shown by its curves.
"""

import gc
import importlib.util
import sys


class _Finder:
    """Changes the module of keys when it is imported, for not every process imports jax."""

    def find_spec(self, name, path=None, target=None):
        if name != "jax._src.cache_key":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module._hash_accelerator_config = module._hash_devices

        spec.loader.exec_module = exec_module
        return spec


class _NoTensorFlow:
    """An installed TensorFlow whose import fails as if it were not there."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == "tensorflow" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise ModuleNotFoundError(f"no module {module.__name__}", name=module.__name__)


sys.meta_path.insert(0, _Finder())
sys.meta_path.insert(0, _NoTensorFlow())
# As for the tests themselves: the collector would walk through all that is imported and traced, again and again.
gc.set_threshold(50_000, 20, 50)
