"""What a whole training run takes, before it starts.

    Run             what is asked: a model's configuration, a batch, what trains and how it is spread
    footprint       its peak and the parts of it, for our loss and for full logits
    answers         the longest length, the largest batch, what to change

One step of the real architecture is run on fake tensors, which have sizes and no memory (`step`): a few of its layers,
as many as it takes to see every kind. The layers between the first and the last repeat, and so does what they do to
memory (`timeline`). Weights, gradients and optimiser state are counted; head and loss are `estimate.estimate`'s.
"""
