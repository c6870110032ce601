"""How much memory a job takes on each GPU, what crosses the network in a step, and how to need less.

What depends on the job alone is pure; what depends on the model is counted on its own code, run on tensors that have
shapes but no numbers, so that a model of any architecture and size is judged in seconds and nothing is downloaded.
"""
