"""A source of a user's own in few lines, right as it stands; tests make one mistake each."""

import numpy as np


class Counted:
    """`length` grey images of `image_size` px."""

    image_size = 4

    def __init__(self, length=8):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = np.full((self.image_size, self.image_size, 3), index, np.uint8)
        return {"image": image, "captions": [f"number {index}"], "key": str(index)}

    def describe(self):
        return f"{self.length} numbers"

    def held_out(self):
        return self
