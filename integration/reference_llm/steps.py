"""What the driver sends for one step. The reply is one token id for each sequence, in order."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Sampling:
    """How the next token of a sequence is chosen.

    Attributes:
        temperature: 0 takes the most likely token; above, tokens are drawn with the logits divided by it.
        seed: of the draws. The same seed draws the same tokens, whatever else is in the batch.
    """

    temperature: float = 0.0
    seed: int = 0


@attrs.frozen(kw_only=True)
class SequenceStep:
    """One sequence's part of a step: its whole prompt, or the token it got last.

    Attributes:
        tokens: ids to compute.
        start: position of the first of them; the KV cache holds everything before it.
        blocks: the sequence's block table; covers positions 0 to ``start + len(tokens) - 1`` at least.
        sampling: how to choose the token that follows.
    """

    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    sampling: Sampling


@attrs.frozen
class StepRequest:
    """One step of some sequences, prompts and continuations mixed as they come."""

    sequences: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return sum(len(sequence.tokens) for sequence in self.sequences)
