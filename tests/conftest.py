"""What all tests share."""

import torch

# One thread for each test process: two that wait for each other on a busy machine are many times slower than one.
torch.set_num_threads(1)
torch.set_flush_denormal(True)
