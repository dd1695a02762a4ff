"""What torch's generator on the CPU draws, by numpy's Mersenne twister; shares no code with the package."""

import numpy as np


class Twister:
    """The generator of the `number`-th use of `seed`."""

    def __init__(self, seed, number):
        self.value = int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]) // 2
        self.words = np.random.RandomState(self.value % 2**32)

    def word(self):
        return int(self.words.randint(2**32, dtype=np.uint32))

    def permutation(self, num):
        order = [*range(num)]
        for place in range(num - 1):
            other = place + self.word() % (num - place)
            order[place], order[other] = order[other], order[place]
        return order

    def floats(self, num):
        return [self.word() % 2**24 / 2**24 for _ in range(num)]

    def doubles(self, num):
        return [((self.word() << 32) + self.word()) % 2**53 / 2**53 for _ in range(num)]
