"""Which records make up each step: grouped by length and modality, decided by seed and epoch alone.

The idea is LLaVA's `group_by_modality_length`: a global batch holds either conversations about images or texts, so that
no process waits for another's encoder. Within it, a micro-batch takes records of like length, so that little is padded,
and processes take neighbouring micro-batches at the same time.
"""

import numpy as np


class Sampler:
    """The plan of a run. Every epoch has `steps_in_epoch` global batches; the last ones may be smaller or mixed.

    lengths: for each record, its length in any unit; negative for one without image. Never 0.
    datasets: for each dataset, (number of records, weight), in the order of `lengths`. weight: see `recipe.Records`.
    Raises ValueError where a weight leaves no record.
    """

    def __init__(self, lengths: np.ndarray, datasets: list[tuple[int, float]], global_batch: int, seed: int):
        self._lengths, self._datasets, self._batch, self._seed = lengths, datasets, global_batch, seed
        for number, (count, weight) in enumerate(datasets, 1):
            if not round(count * weight):
                raise ValueError(f"weight {weight} leaves none of the {count} records of dataset {number}")
        drawn = sum(round(count * weight) for count, weight in datasets)
        self.steps_in_epoch = -(-drawn // global_batch)

    def epoch(self, number: int) -> list[np.ndarray]:
        """The global batches of an epoch: indices of records, longest first."""
        random = np.random.default_rng((self._seed, number))
        indices = random.permutation(self._draw(random))
        with_image = self._lengths[indices] > 0
        whole, rest = [], []
        for group in (indices[with_image], indices[~with_image]):
            cut = len(group) - len(group) % self._batch
            whole += np.split(group[:cut], cut // self._batch) if cut else []
            rest.append(group[cut:])
        rest = np.concatenate(rest)
        last = [rest[at : at + self._batch] for at in range(0, len(rest), self._batch)]
        batches = [whole[i] for i in random.permutation(len(whole))] + last
        return [batch[np.argsort(-np.abs(self._lengths[batch]), kind="stable")] for batch in batches]

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        """Each dataset as often as its weight says."""
        drawn, start = [], 0
        for count, weight in self._datasets:
            times, part = divmod(round(count * weight), count)
            drawn += [start + np.tile(np.arange(count), times), start + random.permutation(count)[:part]]
            start += count
        return np.concatenate(drawn)


def micro_batches(batch: np.ndarray, size: int, count: int, rank: int, processes: int) -> list[np.ndarray]:
    """The `count` micro-batches, of at most `size` records, that process `rank` has of a global batch.

    Some are empty where the global batch is smaller than the rest.
    """
    return [batch[slot * size : (slot + 1) * size] for slot in range(rank, count * processes, processes)]
