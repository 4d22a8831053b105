"""Measurements against what users would pick instead. Each prints a table and writes out/bench/<name>.json.

`aggregation` (make bench-aggregate) against Flower and the store's own speed; `training` (make bench-dp)
against training without privacy and Opacus. Absolute times depend on the machine and on who shares it; the
arms of a case take turns, so that their ratios do not.
"""
