"""The metric `digits`: real digits are recognised, wrong ones are not."""

import numpy as np
import pytest

from scaling_dit.data import digits
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.evaluation.scoring import Scoring, score


def test_real_digits_are_recognised_and_wrong_ones_are_not(tmp_path):
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    by_digit = [digits.to_images(scans[labels == d][:5].reshape(-1, 8, 8)) for d in range(10)]
    images = np.stack([np.repeat(by_digit[i % 10][i // 10][..., None], 3, axis=-1) for i in range(50)])

    source = create_source(f"folder:{digits.write(tmp_path)}", image_size=16)
    metric = METRICS["digits"]()
    items = metric.items(source, 50)
    assert items[7].prompt == "a handwritten seven"
    scoring = Scoring("digits", metric, items, batch=7)
    result, rows = score(scoring, [images], 0)
    assert result["tifa_average"] > 0.95 and result["accuracy_on_real_scans"] > 0.95
    assert result["scalars"] == {"digit_accuracy": result["tifa_average"]}
    assert "real scans" in metric.table(result) and "SVC" in metric.about()["judge"]
    assert next(iter(rows))["questions"][0]["answer"] == "zero"
    assert score(scoring, [np.roll(images, -1, axis=0)], 0)[0]["tifa_average"] < 0.1


def test_other_images_are_refused():
    for preset in ("free32", "grid16"):
        with pytest.raises(UserError, match="16x16"):
            METRICS["digits"]().items(create_source("shapes", preset=preset), 4)
