"""What the stages report about themselves while they run."""


class Measures:
    """Receives durations and batch sizes, from the stages' own threads; this one ignores them."""

    def decoded(self, seconds: float) -> None:
        """One photo was decoded."""

    def classified(self, photos: int, seconds: float) -> None:
        """One batch was classified."""

    def moved(self, photos: int, seconds: float) -> None:
        """One batch was moved; `photos` of it left the inbox."""
