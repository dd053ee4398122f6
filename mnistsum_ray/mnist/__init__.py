"""The built-in task: the digit of an image of MNIST, and digit + number."""

from typing import Final

SIDE: Final = 28  # pixels of an image, down and across
DIGITS: Final = 10
NUMBERS: Final = 10  # 0..9: a training row gets one at random, a row to be scored has its own
SUMS: Final = DIGITS + NUMBERS - 1

HEADS: Final = ("digit", "sum")
"""What the network answers, in the order of its outputs: as in `pred_digit`, `digit_prob`."""
