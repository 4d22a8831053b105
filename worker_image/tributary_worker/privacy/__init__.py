"""Record-level DP-SGD on unpatched DeepSpeed.

`engine.PrivateEngine` ties it together; `train.py` is its only user. Reading order: `sampler` (who takes part
in a step), `adapters` (a gradient per record), `clipping` (what one record may contribute), `noise` and
`optimizer` (what hides it), `layout` (where an element of the gradient ends up under ZeRO), `selftest` (proof
on the running engine).
"""
