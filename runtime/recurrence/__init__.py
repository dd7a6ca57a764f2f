"""Recurrences differentiated exactly: one step traced once, its vjp split into before, inside and after the time loop.

`joint.py` traces a step and its vjp; `collapse.py` finds what the loop over time must do; `loop.py` writes that loop;
`all_steps.py` evaluates everything else for all steps at once; `time_sums.py` makes weight gradients one product each;
`recurrence.py` puts them together; `cells.py` and `stack.py` bring torch's own recurrent modules into this form.
"""
