"""What `stress.py` checks: order and answers under load, messages of all sizes and kinds, memory of one's own."""
