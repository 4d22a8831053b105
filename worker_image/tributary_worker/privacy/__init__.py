"""Record-level DP-SGD on unpatched DeepSpeed.

`engine.PrivateEngine` ties it together; `train.py` is its only user. Reading order: `sampler` (who takes part
in a step), `taps` (what each layer was given, and the gradient at its output), `layers` and `parts` (the
gradients of records that follow from them), `clipping` (what one record may contribute), `trained` (all of
it for the weights of a model), `noise` and `optimizer` (what hides it), `layout` (where an element of the
gradient ends up under ZeRO), `selftest` (proof on the running engine).
"""
