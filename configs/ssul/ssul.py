"""SSUL: an unknown class, sigmoids, and from stage 1 on only the new, unknown and background classifiers are trained
(Cha et al., NeurIPS 2021; see docs/ssul.md)."""
segmentation_loss = dict(type='OneVsRestLoss')
pseudo_labeler = dict(type='SigmoidPseudoLabeler', threshold=0.7)
distillation = dict()
classifier_init = 'unknown'

# 'folder': maps as SSUL's authors ship them; 'everything': all background is unknown, as they do on ADE20K.
saliency = 'spectral_residual'
saliency_folder = None
label_transforms = [dict(type='MarkUnknown', saliency='$saliency', folder='$saliency_folder')]

method_initial_stage = dict(
    model=dict(unknown=True),
    train_dataloader=dict(dataset=dict(label_transforms='$label_transforms')))
method_later_stages = dict(
    model=dict(
        unknown=True,
        frozen=(
            '*',
            '!decode_head.conv_seg.new',
            '!decode_head.conv_seg.unknown',
            '!decode_head.conv_seg.background')),
    optim_wrapper=dict(
        paramwise_cfg=dict(custom_keys={'decode_head.conv_seg.background': dict(lr_mult=1e-4)})),
    train_dataloader=dict(dataset=dict(label_transforms='$label_transforms')))
