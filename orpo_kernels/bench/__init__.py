"""`orpo-kernels bench`: head and loss of an ORPO step by this package and by others, on the same inputs.

    problem, lengths   the inputs: sizes, dtype, which positions are scored
    peers              every contestant, a file each
    exact              the judge: loss, log-probabilities and gradients in float64
    child, meter       one measurement, in a process of its own
    runner             all of them, in interleaved rounds
    report, plots      table, comparison of two results, pictures

and, with `--layouts`, whole training steps of a model by the layout of their batches:

    layout_inputs      the model and the pairs
    layout_losses      the contestants
    layouts            the rounds, the comparison with float64, the table

Time is the wall clock of forward and of forward + backward, the device synchronised. Memory is the growth from
before the call to its peak, results included: on a GPU the allocator's, on Linux the resident set's own high-water
mark, so that nothing samples while the clock runs.
"""
