"""A TFDS builder for tests: prepared without TensorFlow, because its images are given as files.

In a file of its own, because TFDS asks a builder for the folder that its class stands in.
"""

import io

import numpy as np
import tensorflow_datasets as tfds

from tests.support.image_sets import picture

COUNT = 40
VALIDATION = 10


def alt(number):
    return [f"number {number}", f"the {number}"]


class TinySet(tfds.core.GeneratorBasedBuilder):
    """The features that `coco_captions` has, as far as they matter, and synthetic captions.

    `files` replaces the image of some numbers, `texts` their captions.
    """

    VERSION = tfds.core.Version("1.2.0")
    name = "tiny_set"

    def __init__(self, files=None, texts=None, **options):
        self._files, self._texts = files or {}, texts or {}
        super().__init__(**options)

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "image/filename": tfds.features.Text(),
            "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
            "synthetic": tfds.features.Sequence(np.str_),
            "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "is_crowd": np.bool_}),
            "similarity": tfds.features.Scalar(np.float64),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(0, COUNT), "val": self._generate_examples(COUNT, VALIDATION)}

    def _generate_examples(self, first, count):
        for number in range(first, first + count):
            texts = self._texts.get(number, alt(number))
            yield (
                number,
                {
                    "image": io.BytesIO(self._files.get(number, picture(number))),
                    "image/filename": f"{number}.png",
                    "captions": [{"text": text, "id": number} for text in texts],
                    "synthetic": [f"synthetic {number}"] * 5,
                    "objects": [],
                    "similarity": 0.5,
                },
            )
