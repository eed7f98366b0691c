"""Lower a scan in a captured graph to one operator that runs the machine code of one step T times.

Takes a step as a function of tensors; gives the last carry and the outs of all steps as nodes of the graph. ``lower``
traces the step, ``partition`` separates the recurrence from the rest, ``operators`` runs the recurrence, ``shared``
finds recurrences that another loop has computed already.
Imports compile.capture, compile.inductor and the rooms below.
"""
