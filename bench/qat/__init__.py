"""Training with fake-quantize in it: what it costs in time and memory, ours beside torch.ao's."""
