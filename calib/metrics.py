"""How answers are scored: ANLS and exact match for text, intersection over union for boxes."""

from rapidfuzz.distance import Levenshtein

from runtime.text.boxes import Corners


def anls(answer: str, truth: str) -> float:
    """Normalised Levenshtein similarity of one answer, 0 where it is below one half (DocVQA, arXiv 1907.00490 and
    2007.00398, threshold 0.5). Case and surrounding space do not count. Averaged over questions it is ANLS."""
    answer, truth = answer.strip().lower(), truth.strip().lower()
    distance = Levenshtein.normalized_distance(answer, truth)
    return 1 - distance if distance < 0.5 else 0.0


def exact_match(answer: str, truth: str) -> bool:
    """Equal but for surrounding space."""
    return answer.strip() == truth.strip()


def iou(one: Corners, other: Corners) -> float:
    """Intersection over union of two boxes; 0 where one of them has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(one) + _area(other) - shared)


def _area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
