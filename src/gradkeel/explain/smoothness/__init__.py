"""Local smoothness along a run, and the (L0, L1) fit."""
