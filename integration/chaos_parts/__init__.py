"""The parts of `chaos.py`: what is asked of the workers, what is done to them, and what a round is made of."""
