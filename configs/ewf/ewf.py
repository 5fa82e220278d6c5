"""EWF on PLOP: after each stage the weights are fused with the previous snapshot's (Xiao et al., CVPR 2023; see
docs/between_stages.md)."""
_base_ = ['../plop/plop.py']
method_hooks = [dict(type='WeightFusionHook')]
