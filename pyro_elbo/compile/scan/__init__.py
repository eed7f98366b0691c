"""Lower a scan in a captured graph to one operator that runs the machine code of one step T times.

Takes a step as a function of tensors; gives the last carry and the outs of all steps as nodes of the graph. ``trace``
traces the step with its gradient, ``paths`` tells what receives one, ``partition`` separates the recurrence from the
rest, ``operators`` runs it: ``scalar_code`` writes small ones as one loop in C++, on the vectors of ``lanes``, and
``native`` calls the others step by step, with the ``products`` of a step in its code. ``shared`` finds recurrences that
another loop has computed already, ``lower`` joins them. ``chain_ops`` sums over the paths of a discrete state.
Imports compile.capture, compile.inductor and the rooms below.
"""
