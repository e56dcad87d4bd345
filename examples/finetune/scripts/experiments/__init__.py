"""What reproduce.py is made of: the experiments, what they need, their runs, and what is told of them."""
