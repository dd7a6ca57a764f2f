"""Recurrences taken apart: one step traced once, its vjp split into before, inside and after the loop over time.

`joint.py` traces a step and its vjp; `collapse.py` finds what the loop over time must do; `loop.py` writes that loop;
`all_steps.py` evaluates everything else for all steps at once; `time_sums.py` makes weight gradients one product each;
`recurrence.py` puts them together. In place of the loop, `iterated.py` can run Highway-BP: `splitting.py` finds what
acts element by element, `cheap.py` and `scan.py` solve that for all steps, `at_once.py` does the products of all steps.
`cells.py` and `stack.py` bring torch's own recurrent modules into this form.
"""
