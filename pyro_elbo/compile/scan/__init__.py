"""A scan inside of a captured graph: one operator that runs the machine code of one step T times.

Takes a step as a function of tensors; gives the last carry and the outs of all steps as parts of the graph. ``lower``
traces the step, ``partition`` splits off what needs no carry, ``operators`` runs the rest, ``shared`` finds recurrences
that another loop has computed.
Imports compile.capture, compile.inductor and below.
"""
