"""C-RLS of CFSSeg (SegACIL): stage 0 is trained as FT's, then everything is frozen and each stage's classifier is computed
in one pass over its images, by ridge regression on a random expansion of the features (ACM MM 2025; docs/closed_form.md).

In the sequential setting background is background: --cfg-options setting=sequential pseudo_labeler=None
"""
segmentation_loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
pseudo_labeler = dict(type='SigmoidPseudoLabeler', threshold=0.6)
distillation = dict()
classifier_init = 'random'

expansion_width = 8192
method_hooks = [dict(type='ClosedFormHook', gamma=1.0, stride=16)]
method_initial_stage = dict(model=dict(closed_form=dict(width='$expansion_width')))
method_later_stages = dict(model=dict(closed_form=dict(width='$expansion_width')))
