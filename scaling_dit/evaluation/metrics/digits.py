"""The metric `digits`: does a classifier fitted on real scans recognise the digit that a caption asked for?"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_dit.data.digits import WORDS, captions, to_scans
from scaling_dit.data.sources import Source
from scaling_dit.data.sources.folder import FolderSource
from scaling_dit.errors import UserError
from scaling_dit.evaluation import tifa
from scaling_dit.evaluation.bases import Base, no_prompt_set
from scaling_dit.evaluation.metric import Batch, Item, Items, Row, Rows, State

CLASSIFIER = "scikit-learn SVC (RBF kernel) on the bundled digits"
# Share of the scans that the classifier is not fitted on, to say how far it can be trusted.
_HELD_BACK = 0.2


class DigitAccuracy(Base):
    """Accuracy of an SVC on generated digits, equally many of each; a `metric.Metric`, scored as TIFA."""

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """`count` prompts, digit after digit in turn.

        Raises:
          UserError: images of another size than the images of `data.digits`.
        """
        if source.image_size != 16 or not isinstance(source, FolderSource):
            raise UserError(
                f"metric 'digits' reads the 16x16 images of `python -m scaling_dit.data.digits`; "
                f"got {source.image_size} px from {source.describe()}"
            )
        return Items(count, _item)

    def check_items(self, items: Sequence[Item], where: str) -> None:
        """Refuses every prompt set, for none is about the ten digits; raises UserError."""
        raise no_prompt_set(where, "digits", "digits", "the images of `python -m scaling_dit.data.digits`")

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """TIFA's rows, each with the one question that the classifier answers.

        Raises:
          UserError: scikit-learn is not installed.
        """
        classify, _ = self._classifier
        digits = iter(classify(batch.images))
        rows = [
            tifa.caption_row(image, item.questions, lambda _, questions: [WORDS[next(digits)]])
            for image, item in zip(batch.images, batch.items, strict=True)
        ]
        return state, rows

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """TIFA's result (`tifa.summary`) by digit, `scalars`, and the classifier's accuracy on real scans new to it."""
        result = tifa.summary(rows, CLASSIFIER, seed)
        result["accuracy_on_real_scans"] = self._classifier[1]
        result["scalars"] = {"digit_accuracy": result["tifa_average"]}
        return result

    def about(self) -> dict[str, Any]:
        """The classifier, which reads images as they are."""
        return {"judge": CLASSIFIER}

    def table(self, result: Mapping[str, Any]) -> str:
        """`result` for people."""
        real = f"the classifier on real scans it was not fitted on: {result['accuracy_on_real_scans']:.3f}"
        return f"{tifa.table(result)}\n{real}"

    @functools.cached_property
    def _classifier(self) -> tuple[Any, float]:
        return fit_classifier()


def _item(number: int) -> Item:
    digit = number % len(WORDS)
    key, prompt = f"digit-{number:05d}", captions(digit)[0]
    question = {
        "id": key,
        "caption": prompt,
        "question": "which digit is this?",
        "choices": list(WORDS),
        "answer": WORDS[digit],
        "element_type": WORDS[digit],
        "element": WORDS[digit],
    }
    return Item(key, prompt, [question])


def fit_classifier() -> tuple[Any, float]:
    """(images uint8 [N, 16, 16, 3] -> digits [N], accuracy on real scans held back from the fit).

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC
    except ImportError:
        raise UserError("metric 'digits' needs scikit-learn: pip install scikit-learn") from None
    scans, labels = load_digits(return_X_y=True)
    fit_x, test_x, fit_y, test_y = train_test_split(
        scans, labels, test_size=_HELD_BACK, random_state=0, stratify=labels
    )
    classifier = SVC(gamma=0.001, C=10.0).fit(fit_x, fit_y)

    def classify(images: np.ndarray) -> np.ndarray:
        return classifier.predict(to_scans(images).reshape(len(images), -1))

    return classify, float(classifier.score(test_x, test_y))
