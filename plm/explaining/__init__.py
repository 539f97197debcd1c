"""What users of a fitted method differ in, as a page for people: ``plm explain``."""

from plm.explaining.explanation import Explanation, explain
from plm.explaining.rewards import pairs_nobody_learned, scorers

__all__ = ["Explanation", "explain", "pairs_nobody_learned", "scorers"]
